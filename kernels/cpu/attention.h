// What attention.cpp and the files of the instruction sets agree on.
//
// Letters: B images, S tokens of which the first T ask, d numbers per head, D = heads * d.
#pragma once
#include "common.h"

namespace insvp_fast {

struct Attention {
  Array qkv;    // [B, S, 3*D]
  Array out;    // [B, T, D]: written by forward; its gradient, read by backward
  Array d_qkv;  // [B, S, 3*D]: backward only
  int64_t S, T, heads, d;
  float scale;

  // Scratch: matrices of S rows as long as `width` (d rounded up to whole cache lines), or of d rows as long as
  // `stride` (S so rounded up, to an odd number of lines: a column's elements then fall into different cache sets),
  // take `tokens` floats each; those of a block of queries have rows as long as `stride` and take `scores` floats.
  int64_t width, stride, tokens, scores;
};

constexpr int64_t kQueries = 48;  // of a block, whose scores then stay in the first or second cache level

// How many matrices of each kind a call may use.
constexpr int64_t kFwdTokens = 6, kFwdScores = 2, kBwdTokens = 12, kBwdScores = 4;

// Each computes one head of one image.
struct AttentionKernels {
  void (*fwd)(const Attention&, int64_t image, int64_t head, float* scratch);
  void (*bwd)(const Attention&, int64_t image, int64_t head, float* scratch);
};

extern const AttentionKernels attention_generic, attention_avx2, attention_avx512;
extern const AttentionKernels attention_avx512_bf16;  // for qkv in bf16

}  // namespace insvp_fast
