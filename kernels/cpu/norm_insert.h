// What norm_insert.cpp and the files of the instruction sets agree on.
//
// Letters: B images, T tokens, L prompts, S = T + L rows of an image, D width.
#pragma once
#include "common.h"

namespace insvp_fast {

struct NormInsertFwd {
  int64_t T, L, D;
  Array residual, branch, prompts;  // [B, T, D] twice and [B, L, D]; the last two may be absent
  int64_t prompts_stride;           // elements from one image's prompts to the next
  const float *weight, *bias;       // [D]; null: absent
  float eps;
  Array total, normed, xhat;  // [B, T, D] and [B, S, D] twice; total without a branch and xhat without a weight are absent
  float* rstd;                // [B, S]
};

struct NormInsertBwd {
  int64_t T, L, D;
  Array grad_total, grad_normed, xhat;  // the first may be absent
  const float *rstd, *weight;
  Array d_residual, d_branch, d_prompts;  // [B, T, D] twice and [B, L, D]; the last two may be absent
};

// Each computes the rows first <= b * S + s < last; `scratch` holds a row of D floats.
struct NormInsertKernels {
  void (*fwd)(const NormInsertFwd&, int64_t first, int64_t last, float* scratch);
  void (*bwd)(const NormInsertBwd&, int64_t first, int64_t last, float* scratch);
};

extern const NormInsertKernels norm_insert_generic, norm_insert_avx2, norm_insert_avx512;

}  // namespace insvp_fast
