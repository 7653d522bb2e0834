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
      if (a.pre.data) expect(a.pre, m * a.N + next_column);
    }
    row += rows;
    sums += rows * kColumns;
  }
};

void linear_block(const Linear& a, const LinearBlock& b, float* scratch) {
  const TileShapes shapes;
  const int64_t K = round_up(ceil_div(a.K, kFactors), kStep), runs = ceil_div(K, kDepth);  // K in words
  const int64_t rows = round_up(b.rows, kRows), steps = larger(1, rows / kRows * K / kStep);
  const int64_t rows_a_step = ceil_div(rows, steps), lines_a_step = ceil_div(K * kColumns / kLine, steps);
  word* x = reinterpret_cast<word*>(scratch);
  float *sums = scratch + runs * rows * kRowStride, *others = sums + rows * kColumns;
  Unfinished before;

  for (int64_t n = b.column; n < b.column + b.columns; n += kColumns) {
    const int64_t columns = smaller(kColumns, a.N - n);
    const word *w = static_cast<const word*>(a.w) + n * K, *next = w + K * kColumns;
    const auto meanwhile = [&] {
      before.finish_some(a, rows_a_step);
      for (int64_t i = 0; i < lines_a_step; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
    };
    for (int64_t k = 0; k == 0 || k < K; k += kDepth) {
      const int64_t depth = smaller(kDepth, K - k);
      for (int64_t j = 0; j < b.rows; j += kRows) {
        const int64_t height = smaller(kRows, b.rows - j);
        word* xj = x + (k / kDepth * rows + j) * kRowStride;
        if (n == b.column) take(xj, a, {b.row + j, height, k, depth});
        with_tiles(height, columns, [&](auto down, auto across) {
          multiply_tiles<down.value, across.value, Once::yes>(
              {sums + j * kColumns, kColumns}, {xj, kRowStride}, {w + k * kColumns, kColumns}, depth, k > 0, meanwhile);
        });
      }
    }
    before.finish_some(a, b.rows);
    const int64_t last = b.column + b.columns - kColumns;
    before = {finish_of(a, n), sums, b.row, b.row + b.rows, n, n < last ? n + kColumns : n};
    float* free = others;
    others = sums, sums = free;
  }
  before.finish_some(a, b.rows);
}

}  // namespace
