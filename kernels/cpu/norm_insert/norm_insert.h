// The interface between norm_insert.cpp and kernel.cpp.
//
// Letters: B images, T tokens, L prompts, S = T + L rows of an image, D width.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

struct NormInsertFwd {
  int64_t T, L, D;
  Array residual, branch, prompts;  // [B, T, D] twice and [B, L, D]; the last two may be absent
  int64_t prompts_stride;           // elements from one image's prompts to the next
  const float *weight, *bias;       // [D]; null: absent
  float eps;
  bool center;
  Array total, normed, xhat;  // [B, T, D] and [B, S, D] twice; total is absent without a branch, xhat without a weight
  float* rstd;                // [B, S]
};

struct NormInsertBwd {
  int64_t T, L, D;
  Array grad_total, grad_normed, xhat;  // the first may be absent
  const float *rstd, *weight;
  bool center;
  Array d_residual, d_branch, d_prompts;  // [B, T, D] twice and [B, L, D]; the last two may be absent
};

// Each computes the rows first <= b * S + s < last; `scratch` holds a row of D floats.
struct NormInsertKernels {
  void (*fwd)(const NormInsertFwd&, int64_t first, int64_t last, float* scratch);
  void (*bwd)(const NormInsertBwd&, int64_t first, int64_t last, float* scratch);
};

}  // namespace insvp_fast
