// The softmax of the rows of a matrix, and its gradient.
#pragma once
#include "common/exp.h"
#include "common/sizes.h"
#include "transpose.h"

namespace {

// The sum or maximum of all elements, in every element.
template <class Operation>
inline vec reduce(vec v, Operation operation) {
#pragma GCC unroll 4
  for (int n = 1; n < kWidth; n *= 2) v = operation(zip<0>(v, v), zip<1>(v, v));
  return v;
}

inline vec maximum(vec a, vec b) { return a > b ? a : b; }
inline vec add(vec a, vec b) { return a + b; }

// The softmax of each row, in place. What follows its `count` columns up to a whole vector becomes zero.
inline void softmax(float* x, int64_t rows, int64_t count, int64_t stride) {
  const int64_t end = round_up(count, kWidth);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = count; i < end; ++i) x[j * stride + i] = -__builtin_inff();
  for (int64_t j = 0; j < rows; ++j, x += stride) {
    vec most = load(x), total = {};
    for (int64_t i = kWidth; i < end; i += kWidth) most = maximum(load(x + i), most);
    most = reduce(most, maximum);
    for (int64_t i = 0; i < end; i += kWidth) {
      const vec e = exp(load(x + i) - most);
      total += e;
      store(x + i, e);
    }
    const vec factor = 1.0f / reduce(total, add);
    for (int64_t i = 0; i < end; i += kWidth) store(x + i, factor * load(x + i));
  }
}

// Turns the gradient of the probabilities p into that of the scores, in place.
inline void softmax_bwd(float* dp, const float* p, int64_t rows, int64_t count, int64_t stride) {
  for (int64_t j = 0; j < rows; ++j, p += stride, dp += stride) {
    vec products = {};
    for (int64_t i = 0; i < count; i += kWidth) products += load(p + i) * load(dp + i);
    const vec delta = reduce(products, add);
    for (int64_t i = 0; i < count; i += kWidth) store(dp + i, load(p + i) * (load(dp + i) - delta));
  }
}

}  // namespace
