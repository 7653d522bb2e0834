// A block of y, its sums in matrix registers. The processor multiplies matrices and computes vectors at the same time:
// while a panel is multiplied, the results of the one before are made.
#pragma once
#include "common/amx.h"
#include "common/sizes.h"
#include "operands.h"
#include "results.h"

namespace {

using namespace insvp_fast;

// The rows of a panel that have sums, but no results yet.
struct Unfinished {
  Finish finish = nullptr;
  const float* sums = nullptr;
  int64_t row = 0, end = 0, column = 0, next_column = 0;  // the latter of the panel after it, in this block

  // Makes the results of the next `rows` rows, and prefetches where those of the next panel will be written.
  void finish_some(const Linear& a, int64_t rows) {
    rows = smaller(rows, end - row);
    if (rows == 0) return;
    finish(a, sums, row, rows, column);
    for (int64_t m = row; m < row + rows && next_column > column; ++m) {
      expect(a.y, m * a.N + next_column);
      if (a.pre.data && !a.pre_past_caches) expect(a.pre, m * a.N + next_column);
    }
    row += rows;
    sums += rows * kColumns;
  }
};

void linear_block(const Linear& a, const LinearBlock& b, float* scratch) {
  const TileShapes shapes;
  const int64_t K = round_up(ceil_div(a.K, kFactors), kStep), part = b.runs * kDepth;  // in words
  const int64_t rows = round_up(b.rows, kRows), end_column = b.column + b.columns, last_column = end_column - kColumns;
  const word* const w = static_cast<const word*>(a.w);
  word* x = reinterpret_cast<word*>(scratch);
  float* const sums_of_block = scratch + b.runs * rows * kRowStride;
  Unfinished before;

  for (int64_t first = 0; first == 0 || first < K; first += part) {
    const int64_t end = smaller(K, first + part), steps = larger(1, rows / kRows * (end - first) / kStep);
    const int64_t rows_a_step = ceil_div(rows, steps), lines_a_step = ceil_div((end - first) * kColumns / kLine, steps);
    for (int64_t n = b.column; n < end_column; n += kColumns) {
      const int64_t columns = smaller(kColumns, a.N - n), panel = (n - b.column) / kColumns;
      // the sums of each panel wait for the next part; in a single one, they only wait for their results
      float* sums = sums_of_block + (part < K ? panel : panel % 2) * rows * kColumns;
      const word* next =
          n < last_column ? w + (n + kColumns) * K + first * kColumns : w + b.column * K + end * kColumns;
      const auto meanwhile = [&] {
        before.finish_some(a, rows_a_step);
        for (int64_t i = 0; i < lines_a_step; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
      };
      for (int64_t k = first; k == first || k < end; k += kDepth) {
        const int64_t depth = smaller(kDepth, end - k);
        for (int64_t j = 0; j < b.rows; j += kRows) {
          const int64_t height = smaller(kRows, b.rows - j);
          word* xj = x + ((k - first) / kDepth * rows + j) * kRowStride;
          if (n == b.column) take(xj, a, {b.row + j, height, k, depth});
          with_tiles(height, columns, [&](auto down, auto across) {
            multiply_tiles<down.value, across.value, Once::yes>({sums + j * kColumns, kColumns}, {xj, kRowStride},
                                                                {w + n * K + k * kColumns, kColumns}, depth, k > 0,
                                                                meanwhile);
          });
        }
      }
      before.finish_some(a, b.rows);
      if (end == K)
        before = {finish_of(a, n), sums, b.row, b.row + b.rows, n, n < last_column ? n + kColumns : n};
    }
  }
  before.finish_some(a, b.rows);
  if (a.pre_past_caches) _mm_sfence();  // for threads that read it
}

}  // namespace
