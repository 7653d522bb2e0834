// Products of matrices, c = a @ b: the rows of b and c are read as vectors of words, the words of a one by one.
#pragma once
#include "common/sizes.h"
#include "words.h"

namespace {

// The first operand: element (m, k) is at m * row + k * depth.
struct Elements {
  const float* data;
  int64_t row, depth;
};

// The second operand.
struct Rows {
  const float* data;
  int64_t stride;
};

// The result.
struct Sums {
  float* data;
  int64_t stride;
  bool add;  // to what is there
};

// Cache lines that will be read next. A product prefetches one with each of its steps: many at a time would hold it up.
struct Soon {
  const char* const* next = nullptr;
  const char* const* end = nullptr;
  void expect_one() {
    if (next != end) __builtin_prefetch(*next++);
  }
};

// The sums of a tile, the vectors of one row of b and one element of a fill the registers.
constexpr int kRows = kWidth == 16 ? 6 : 4, kVectors = kWidth == 16 ? 4 : 3;

template <int ROWS, int VECTORS>
inline void tile(Sums c, Elements a, Rows b, int64_t depth, Soon& soon) {
  vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[j][v] = c.add ? load(c.data + j * c.stride + v * kWidth) : vec{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    soon.expect_one();
    vec bk[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) bk[v] = load(b.data + k * b.stride + v * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[j][v] = Words::mul_add(acc[j][v], a.data + j * a.row + k * a.depth, bk[v]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(c.data + j * c.stride + v * kWidth, acc[j][v]);
}

// Part `i` of n things in `parts` parts of nearly the same size begins here.
constexpr int64_t begin_of_part(int64_t i, int64_t n, int64_t parts) { return i * n / parts; }

// c [rows, columns] = a [rows, depth] @ b [depth, columns]. The columns are rounded up to whole vectors, the depth is in
// words. It is not inlined, so that all calls share the code of the tiles.
__attribute__((noinline)) void multiply(Sums c, Elements a, Rows b, int64_t rows, int64_t columns, int64_t depth,
                                        Soon& soon) {
  const int64_t vectors = ceil_div(columns, kWidth), panels = ceil_div(vectors, kVectors), tiles = ceil_div(rows, kRows);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = begin_of_part(p, vectors, panels), n = first * kWidth;
    with_constant<kVectors>(begin_of_part(p + 1, vectors, panels) - first, [&](auto width) {
      for (int64_t t = 0, m = 0, end; t < tiles; ++t, m = end) {
        end = begin_of_part(t + 1, rows, tiles);
        with_constant<kRows>(end - m, [&](auto height) {
          tile<height.value, width.value>({c.data + m * c.stride + n, c.stride, c.add},
                                          {a.data + m * a.row, a.row, a.depth}, {b.data + n, b.stride}, depth, soon);
        });
      }
    });
  }
}

}  // namespace
