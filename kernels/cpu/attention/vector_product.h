// Products in vector registers: the rows of b and c are read as vectors, the words of a one by one.
#pragma once
#include "common/sizes.h"
#include "product.h"
#include "words.h"

namespace {

// The sums of a tile, the vectors of one row of b and one element of a fill the registers.
constexpr int kRows = kWidth == 16 ? 6 : 4, kVectors = kWidth == 16 ? 4 : 3;

// `count` tiles, one below the other. It is not inlined, so that all its sizes get registers of their own.
template <int ROWS, int VECTORS>
__attribute__((noinline)) void strip(Sums c, Elements a, Rows b, int64_t count, int64_t depth, Soon& soon) {
  for (; count; --count, c.data += ROWS * c.stride, a.data += ROWS * a.row) {
    vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[j][v] = c.add ? load(c.data + j * c.stride + v * kWidth) : vec{};
    const float* row = b.data;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, row += b.stride) {
      soon.expect_one();
      vec bk[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) bk[v] = load(row + v * kWidth);
#pragma GCC unroll 8
      for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
          acc[j][v] = Words::mul_add(acc[j][v], a.data + j * a.row + k * a.depth, bk[v]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) store(c.data + j * c.stride + v * kWidth, acc[j][v]);
  }
}

// Columns of c, as many as VECTORS vectors. The first tiles are of one height, those below them are a row less high.
template <int VECTORS>
inline void panel(Sums c, Elements a, Rows b, int64_t rows, int64_t depth, Soon& soon) {
  const int64_t tiles = ceil_div(rows, kRows), height = ceil_div(rows, tiles), low = tiles * height - rows;
  with_constant<kRows>(height, [&](auto high) {
    constexpr int h = high.value;
    strip<h, VECTORS>(c, a, b, tiles - low, depth, soon);
    if constexpr (h > 1) {
      const int64_t done = (tiles - low) * h;
      const Sums below{c.data + done * c.stride, c.stride, c.add};
      if (low) strip<h - 1, VECTORS>(below, {a.data + done * a.row, a.row, a.depth}, b, low, depth, soon);
    }
  });
}

// c [rows, columns] = a [rows, depth] @ b [depth, columns], or added to c. The columns are rounded up to whole vectors,
// the depth is in words. It is not inlined, so that all calls share its code.
__attribute__((noinline)) void multiply(Sums c, Elements a, Rows b, int64_t rows, int64_t columns, int64_t depth,
                                        Soon& soon) {
  const int64_t vectors = ceil_div(columns, kWidth), panels = ceil_div(vectors, kVectors);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * vectors / panels, n = first * kWidth;
    with_constant<kVectors>((p + 1) * vectors / panels - first, [&](auto width) {
      panel<width.value>({c.data + n, c.stride, c.add}, a, {b.data + n, b.stride}, rows, depth, soon);
    });
  }
}

}  // namespace
