// The interface between absorbed_attention.cpp and kernel.cpp.
//
// Letters: S tokens of an image, E numbers of a token, R rows: one for each head and query, which the tokens of the
// image are multiplied by. All tensors have one dtype.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

constexpr int64_t kRows = 4;  // of a job
constexpr int kTogether = 4;  // tokens, or vectors of a token, whose sums are in registers

// weights[r, s] = the softmax over s of scale * rows[r] . x[s], or the gradient by these products where the softmax is
// given: its gradient is rows[r] . x[s]. means[r] = the sum over s of weights[r, s] * x[s].
struct AbsorbedRows {
  int64_t S, E, R;
  Array rows, x, softmax;   // [B, R, E], [B, S, E], and [B, R, S] or absent
  const int64_t* num_keys;  // [B]: the tokens behind these have the weight 0; null: all count
  float scale;
  Array weights, means;  // [B, R, S] and [B, R, E]
};

// d_x[s] = the sum over r of softmax[r, s] * d_means[r] + d_scores[r, s] * rows[r], and d_first[s] for the first T
// tokens.
struct AbsorbedTokens {
  int64_t S, E, R, T;
  Array d_means, softmax, d_scores, rows, d_first;  // [B, R, E], [B, R, S] twice, [B, R, E], [B, T, E]
  Array d_x;                                        // [B, S, E]
};

// Each computes a few rows or tokens of an image. The scratch holds kRows rows of E, in whole steps of kTogether
// vectors, and a row more than kRows of S in whole lines; or 2 * kTogether * R floats.
struct AbsorbedKernels {
  void (*rows)(const AbsorbedRows&, int64_t image, int64_t first, int64_t count, float* scratch);
  void (*tokens)(const AbsorbedTokens&, int64_t image, int64_t first, int64_t count, float* scratch);
};

}  // namespace insvp_fast
