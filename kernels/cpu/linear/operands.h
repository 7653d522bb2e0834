// The rows of x, taken as words.
#pragma once
#include "common/array.h"
#include "linear.h"
#include "tile.h"

namespace {

using namespace insvp_fast;

// Rows of x, at word k of which a run begins.
struct Run {
  int64_t row, rows, k, depth;
};

// Calls f(j, offset of the first factor) for each row.
template <class F>
inline void for_each_row(const Linear& a, const Run& r, F f) {
  int64_t image = r.row / a.T, token = r.row % a.T;
  for (int64_t j = 0; j < r.rows; ++j) {
    f(j, image * a.batch_stride + token * a.row_stride + r.k * kFactors);
    if (++token == a.T) token = 0, ++image;
  }
}

// Copies a run of words of x.
inline void take(word* x, const Linear& a, const Run& r) {
  const int64_t n = smaller(r.depth * kFactors, a.K - r.k * kFactors);
  for_each_row(a, r, [&](int64_t j, int64_t at) {
    factor* to = reinterpret_cast<factor*>(x + j * kRowStride);
#ifdef INSVP_FAST_BF16_PAIRS
    __builtin_memcpy(to, static_cast<const bf16*>(a.x.data) + at, n * sizeof(bf16));
    __builtin_memset(to + n, 0, (r.depth * kFactors - n) * sizeof(bf16));
#else
    if (a.x.type == DType::f32) __builtin_memcpy(to, static_cast<const float*>(a.x.data) + at, n * sizeof(float));
    else copy(to, static_cast<const bf16*>(a.x.data) + at, n, 1.0f);
#endif
  });
}

}  // namespace
