// The interface between rotate.cpp and kernel.cpp.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

struct Rotate {
  Array to, from;  // rows of `parts` that turn, each of `heads` heads of d features, and one part that does not
  int64_t S, first, N;  // rows of an image, of which N turn, from `first` on
  int64_t parts, heads, d;
  const float* rotation;  // [N, 2 * d] for the first head, d sines and d cosines for each row
  int64_t head_stride;    // from there to the rotation of the next head; 0: it is the same
  bool half, forward;     // whether feature i is paired with i + d / 2, else 2 * i with 2 * i + 1
};

struct RotateKernels {
  // A row, counted through all images.
  void (*run)(const Rotate&, int64_t row);
};

}  // namespace insvp_fast
