// The interface between weighted_sum.cpp and kernel.cpp.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

// A term, or the sum, of which each image has `n` numbers in a row. From one image to the next it is `stride` numbers;
// 0: all images share them.
struct Term {
  Array array;
  int64_t stride;
  float weight;
};

struct WeightedSum {
  Term to, a, b;  // to = a.weight * a + b.weight * b; b may be absent
};

struct WeightedSumKernels {
  // Computes the numbers first <= i < last of an image.
  void (*run)(const WeightedSum&, int64_t image, int64_t first, int64_t last);
};

}  // namespace insvp_fast
