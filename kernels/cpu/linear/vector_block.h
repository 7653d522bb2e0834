// A block of y, its sums in vector registers.
#pragma once
#include "common/bf16_pairs.h"
#include "common/sizes.h"
#include "operands.h"
#include "results.h"

namespace {

using namespace insvp_fast;

#ifdef INSVP_FAST_BF16_PAIRS
typedef bits32 words;
inline vec multiply_add(vec sum, word x, words w) { return add_pairs(sum, x, w); }
#else
typedef vec words;
inline vec multiply_add(vec sum, word x, words w) { return sum + x * w; }
#endif

// Where the rows of x that the next tile will need begin, and how many bytes of x become a cache line of words.
struct Soon {
  const char* rows[kRows];
  int64_t line;
};

// Memory that will be needed after this run: `step` bytes of it for each word of a sum.
struct Later {
  const char* data;
  int64_t step;
};

// sums = [sums +] x @ w. Without the pragmas gcc keeps the sums in memory before and after the loop. The words in
// `soon` and in `later` are prefetched on the way: many requests at a time would hold up the product.
template <int ROWS, int VECTORS>
inline void tile(float* sums, const word* x, const word* w, int64_t depth, bool first, const Soon* soon, Later later) {
  vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[j][v] = vec{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(later.data + k * later.step, 0, 2);
    if (soon) __builtin_prefetch(soon->rows[k * kRows / kLine % kRows] + k / kLine * soon->line);
    words wk[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(&wk[v], w + k * kColumns + v * kWidth, sizeof wk[v]);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[j][v] = multiply_add(acc[j][v], x[j * kRowStride + k], wk[v]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* to = sums + j * kColumns + v * kWidth;
      store(to, first ? acc[j][v] : load(to) + acc[j][v]);
    }
}

inline Soon soon(const Linear& a, const Run& r) {
  const int64_t size = size_of(a.x.type);
  Soon s = {{}, kLine * kFactors * size};
  for_each_row(a, r, [&](int64_t j, int64_t at) { s.rows[j] = static_cast<const char*>(a.x.data) + at * size; });
  for (int64_t j = r.rows; j < kRows; ++j) s.rows[j] = s.rows[0];
  return s;
}

// The sums of one panel over one run of words and, with the last run, the results. `next` is the run of w used after
// this one. The first panel copies its rows of x, each tile those that were prefetched with the tile before.
inline void panel_run(const Linear& a, const LinearBlock& b, int64_t column, float* sums, word* x, int64_t k,
                      const word* w, const word* next, int64_t depth, bool first, bool last) {
  const int64_t vectors = smaller(kVectors, ceil_div(a.N - column, kWidth));
  constexpr int64_t row_of_w = kColumns * sizeof(word), line = kLine * sizeof(float);
  Later later{reinterpret_cast<const char*>(next), smaller(line, ceil_div(row_of_w, ceil_div(b.rows, kRows)))};
  const Finish finish = finish_of(a, column);
  for (int64_t j = 0; j < b.rows; j += kRows) {
    const int64_t rows = smaller(kRows, b.rows - j);
    Soon next_rows;
    const Soon* expected = nullptr;
    if (column == b.column) {
      take(x + j * kRowStride, a, {b.row + j, rows, k, depth});
      const int64_t left = b.rows - j - rows;
      if (left > 0) next_rows = soon(a, {b.row + j + rows, smaller(kRows, left), k, depth});
      else if (!last) next_rows = soon(a, {b.row, smaller(kRows, b.rows), k + depth, depth});
      if (left > 0 || !last) expected = &next_rows;
    }
    for (int64_t m = b.row + j; last && m < b.row + j + rows; ++m) {
      expect(a.y, m * a.N + column);
      if (a.pre.data) expect(a.pre, m * a.N + column);
    }
    with_constant<kRows>(rows, [&](auto height) {
      with_constant<kVectors>(vectors, [&](auto width) {
        tile<height.value, width.value>(sums + j * kColumns, x + j * kRowStride, w, depth, first, expected, later);
      });
    });
    later.data += depth * later.step;
    if (last) finish(a, sums + j * kColumns, b.row + j, rows, column);
  }
}

void linear_block(const Linear& a, const LinearBlock& b, float* scratch) {
  const int64_t K = ceil_div(a.K, kFactors), part = b.runs * kDepth;  // in words
  word* x = reinterpret_cast<word*>(scratch);
  for (int64_t first = 0; first == 0 || first < K; first += part) {
    const int64_t end = smaller(K, first + part);
    float* sums = scratch + part / kDepth * b.rows * kRowStride;
    for (int64_t n = b.column; n < b.column + b.columns; n += kColumns) {
      const word* w = static_cast<const word*>(a.w) + n * K;
      for (int64_t k = first; k == first || k < end; k += kDepth) {
        const int64_t depth = smaller(kDepth, end - k), following = k + depth < end ? k + depth : K + first;
        panel_run(a, b, n, sums, x + (k - first) / kDepth * b.rows * kRowStride, k, w + k * kColumns,
                  w + following * kColumns, depth, k == 0, k + depth == K);
      }
      if (part < K) sums += b.rows * kColumns;  // the sums of each panel wait for the next part
    }
  }
}

}  // namespace
