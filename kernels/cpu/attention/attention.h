// The interface between attention.cpp and kernel.cpp.
//
// Letters: B images, S tokens of which the first T are queries, d numbers per head, D = heads * d.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

struct Attention {
  Array qkv;    // [B, S, 3*D]
  Array out;    // [B, T, D]: written by forward; its gradient, read by backward
  Array d_qkv;  // [B, S, 3*D]: backward only
  int64_t S, T, heads, d;
  float scale;

  // The scratch consists of matrices of two kinds. `tokens` floats hold S rows of length `width` or d rows of length
  // `stride`; `scores` floats hold the kQueries rows of length `stride` of a block of queries. `width` is d in whole
  // cache lines, `stride` is S in an odd number of lines.
  int64_t width, stride, tokens, scores;
};

constexpr int64_t kQueries = 48;  // of a block, whose scores then stay in the first or second cache level

// The number of matrices of each kind that a call may use.
constexpr int64_t kFwdTokens = 6, kFwdScores = 2, kBwdTokens = 12, kBwdScores = 4;

// Each computes one head of one image.
struct AttentionKernels {
  void (*fwd)(const Attention&, int64_t image, int64_t head, float* scratch);
  void (*bwd)(const Attention&, int64_t image, int64_t head, float* scratch);
};

}  // namespace insvp_fast
