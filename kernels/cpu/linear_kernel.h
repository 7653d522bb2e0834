// linear on one block of rows and columns, for the vector width of the including file.
#pragma once
#include "linear.h"
#include "vec.h"

namespace {

using namespace insvp_fast;

// The sums of a tile, the weights of one row and one value of x fill the 16 registers, or the 32 of AVX-512. A tile 4
// rows high and 3 vectors wide takes fewer instructions than one of 6 by 2.
constexpr int kRows = kWidth == 16 ? 8 : 4, kVectors = 3, kColumns = kVectors * kWidth;
constexpr float kZeros[kColumns] = {};

// y = from + x @ w. Without the pragmas gcc keeps the sums in memory before and after the loop.
template <int ROWS>
inline void tile(float* y, int64_t y_stride, const float* from, int64_t from_stride, const float* x, const float* w,
                 int64_t depth) {
  vec acc[ROWS][kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[j][v] = vec{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    vec wk[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) wk[v] = load(w + k * kColumns + v * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[j][v] += x[j * kRowStride + k] * wk[v];
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store(y + j * y_stride + v * kWidth, load(from + j * from_stride + v * kWidth) + acc[j][v]);
}

// A tile of any number of rows up to ROWS.
template <int ROWS, class... Arguments>
inline void tile_of(int64_t rows, Arguments... arguments) {
  if (rows == ROWS) return tile<ROWS>(arguments...);
  if constexpr (ROWS > 1) tile_of<ROWS - 1>(rows, arguments...);
}

void linear_block(const LinearBlock& b) {
  const int64_t size = b.depth * kColumns;
  const int64_t share = (size + b.rows - 1) / b.rows;  // of the next panel, to be fetched with each row of this one
  const float* w = b.w;
  for (int64_t n = 0; n < b.columns; n += kColumns, w += size) {
    const bool whole = n + kColumns <= b.columns;
    for (int64_t m = 0; m < b.rows; m += kRows) {
      const int64_t rows = m + kRows < b.rows ? kRows : b.rows - m;
      float* y = b.y + m * b.y_stride + n;
      const float* from = !b.first ? y : b.bias ? b.bias + n : kZeros;
      const int64_t from_stride = b.first ? 0 : b.y_stride;
      const float* x = b.x + m * kRowStride;
      for (int64_t i = 0; i < rows * share; i += 16) __builtin_prefetch(w + size + m * share + i, 0, 2);
      if (whole) {
        for (int64_t j = 0; j < rows; ++j) {
          __builtin_prefetch(y + j * b.y_stride, 1);
          __builtin_prefetch(y + j * b.y_stride + kColumns - 1, 1);
        }
        tile_of<kRows>(rows, y, b.y_stride, from, from_stride, x, w, b.depth);
      } else {
        float edge[kRows * kColumns] = {};
        const int64_t columns = b.columns - n;
        for (int64_t j = 0; j < rows; ++j)
          for (int64_t i = 0; i < columns; ++i) edge[j * kColumns + i] = from[j * from_stride + i];
        tile_of<kRows>(rows, edge, kColumns, edge, kColumns, x, w, b.depth);
        for (int64_t j = 0; j < rows; ++j)
          for (int64_t i = 0; i < columns; ++i) y[j * b.y_stride + i] = edge[j * kColumns + i];
      }
    }
  }
}

}  // namespace
