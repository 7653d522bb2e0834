// The interface between gate.cpp and kernel.cpp.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

// hidden = normalize(activation(pre) * factor), of rows of D numbers, all of one dtype.
struct GateFwd {
  int64_t D;
  Activation activation;
  bool normalize;  // LayerNorm without an affine map
  float eps;
  Array hidden, pre, factor;  // hidden may be in the place of pre; factor may be absent
};

struct GateBwd {
  int64_t D;
  Activation activation;
  bool normalize;
  float eps;
  Array d_pre, d_factor, d_hidden, pre, factor;  // d_pre may be in the place of d_hidden; factor and d_factor absent
};

// Each computes the rows from `first` to before `last`; `scratch` holds so many rows of whole_lines(D) floats.
struct GateKernels {
  static constexpr int64_t fwd_scratch = 1, bwd_scratch = 3;
  void (*fwd)(const GateFwd&, int64_t first, int64_t last, float* scratch);
  void (*bwd)(const GateBwd&, int64_t first, int64_t last, float* scratch);
};

}  // namespace insvp_fast
