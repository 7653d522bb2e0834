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
inline void tile(Sums c, Elements a, Rows b, int64_t depth, float scale, Soon& soon) {
  vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[j][v] = vec{};
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
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c.data + j * c.stride + v * kWidth;
      store(to, c.add ? load(to) + scale * acc[j][v] : scale * acc[j][v]);
    }
}

// A tile of any size up to ROWS x VECTORS. The last bits of gradients depend on this form: a tile that gcc inlines into
// `multiply` adds to c with an fma, a tile that it calls does not. With with_constant its choice differs.
template <int ROWS, int VECTORS, class... Arguments>
inline void tile_of(int64_t rows, int64_t vectors, Soon& soon, Arguments... arguments) {
  if (rows == ROWS && vectors == VECTORS) return tile<ROWS, VECTORS>(arguments..., soon);
  if constexpr (VECTORS > 1)
    if (vectors < VECTORS) return tile_of<ROWS, VECTORS - 1>(rows, vectors, soon, arguments...);
  if constexpr (ROWS > 1) tile_of<ROWS - 1, VECTORS>(rows, vectors, soon, arguments...);
}

// c [rows, columns] = scale * a [rows, depth] @ b [depth, columns]. The columns are rounded up to whole vectors, the
// depth is in words. It is not inlined, so that all calls share the code of the tiles.
__attribute__((noinline)) void multiply(Sums c, Elements a, Rows b, int64_t rows, int64_t columns, int64_t depth,
                                        float scale, Soon& soon) {
  const int64_t vectors = ceil_div(columns, kWidth), panels = ceil_div(vectors, kVectors);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * vectors / panels, count = (p + 1) * vectors / panels - first, n = first * kWidth;
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t height = smaller(kRows, rows - m);
      tile_of<kRows, kVectors>(height, count, soon, Sums{c.data + m * c.stride + n, c.stride, c.add},
                               Elements{a.data + m * a.row, a.row, a.depth}, Rows{b.data + n, b.stride}, depth, scale);
    }
  }
}

}  // namespace
