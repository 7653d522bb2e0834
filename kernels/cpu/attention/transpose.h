// Moving elements between vectors.
#pragma once
#include "common/vec.h"

namespace {

// The elements of a and b in turn: of their lower halves (HALF = 0) or of their upper halves (HALF = 1).
// A template of the vector type, because clang would otherwise check the branches of other widths too.
template <int HALF, class Vec>
inline Vec zip(Vec a, Vec b) {
  constexpr int W = sizeof(Vec) / sizeof(float), h = HALF * W / 2;
  if constexpr (W == 16)
    return __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, h + 4, h + 20, h + 5,
                                   h + 21, h + 6, h + 22, h + 7, h + 23);
  else if constexpr (W == 8)
    return __builtin_shufflevector(a, b, h, h + 8, h + 1, h + 9, h + 2, h + 10, h + 3, h + 11);
  else
    return __builtin_shufflevector(a, b, h, h + 4, h + 1, h + 5);
}

// to [columns, stride] = from [rows, width] transposed. A row of `to` ends with zeros up to a whole vector.
inline void transpose(float* to, int64_t stride, const float* from, int64_t width, int64_t rows, int64_t columns) {
  for (int64_t n = 0; n < rows; n += kWidth)
    for (int64_t k = 0; k < columns; k += kWidth) {
      vec block[kWidth], next[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) block[i] = n + i < rows ? load(from + (n + i) * width + k) : vec{};
#pragma GCC unroll 4
      for (int step = 1; step < kWidth; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kWidth / 2; ++i) {
          next[2 * i] = zip<0>(block[i], block[i + kWidth / 2]);
          next[2 * i + 1] = zip<1>(block[i], block[i + kWidth / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) block[i] = next[i];
      }
      for (int i = 0; i < kWidth && k + i < columns; ++i) store(to + (k + i) * stride + n, block[i]);
    }
}

}  // namespace
