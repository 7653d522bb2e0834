// The interface between attention.cpp and kernel.cpp.
//
// Letters: B images of T = n * w tokens and L prompts, n windows of w tokens each, d numbers per head, D = heads * d.
// The w tokens of a window attend to one another and to all prompts of their image: to S = w + L rows.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

struct Attention {
  Array qkv;               // [B, T+L, 3*D]
  Array out;               // [B, T, D]: written by forward; its gradient, read by backward
  Array d_qkv;             // [B, T+L, 3*D]: backward only
  const int32_t* windows;  // [n, w]: the tokens of each; null: one window of all tokens in their order
  const float* bias;       // [heads, w, w]: added to the scores of tokens; null: none
  const float* mask;       // [n, w, w]: added to the scores of tokens; null: none
  int64_t B, n, w, L, heads, d;
  float scale;
  int64_t T, S;

  // The scratch consists of matrices of two kinds. `tokens` floats hold S rows of length `width` or d rows of length
  // `stride`, with matrix tiles also S rows of a word for two queries; `scores` floats hold the `queries` rows of
  // length `stride` of a block of queries. `width` is d in whole cache lines, `stride` is S in whole lines, an odd
  // number of them if they are many; with matrix tiles all are whole tiles. `lines` floats hold the addresses of the
  // cache lines that a window writes and of those that the next one reads.
  int64_t width, stride, queries, tokens, scores, lines;
};

// The queries of a block. Their scores then stay in the first or second cache level: a small window is one block. With
// matrix tiles blocks are larger, as sums over queries are read and written once for each block.
constexpr int64_t kMostQueries = 128;
namespace {
constexpr int64_t block_of_queries(int64_t w) { return w <= 64 ? w : 48; }
}  // namespace

// The number of matrices of each kind that a call may use.
constexpr int64_t kFwdTokens = 6, kFwdScores = 2, kBwdTokens = 13, kBwdScores = 3;

// Each computes one head of one image, window after window.
struct AttentionKernels {
  int64_t step;  // in which numbers along a sum come
  void (*fwd)(const Attention&, int64_t image, int64_t head, float* scratch);
  void (*bwd)(const Attention&, int64_t image, int64_t head, float* scratch);
};

}  // namespace insvp_fast
