// The interface between linear.cpp and kernel.cpp.
//
// y = x @ w + bias, with M rows, K terms in a sum, N columns. Operands are held in words of 32 bits: one fp32 factor
// or, where the instruction set multiplies pairs, two bf16 factors that are neighbors along K. A block of y is computed
// in tiles that the registers hold. w is packed in panels as wide as a tile, word row after word row. The words of x
// are taken in runs, after each of which the sums leave the registers: a run of a panel stays in the first-level cache
// while the rows of x in a block, which the second level holds, are multiplied with it.
#pragma once
#include "common/abi.h"
#include "common/isa.h"
#include "common/sizes.h"

namespace insvp_fast {

namespace {
// Between the rows of x in a run, in words: an odd number of cache lines, so that rows start in different cache sets.
constexpr int64_t run_stride(int64_t depth) { return odd_lines(depth); }
}  // namespace

enum class Epilogue : int { none, activate, activate_bwd };  // the codes are part of the C ABI

struct Linear {
  Array x;  // row m at (m / T) * batch_stride + (m % T) * row_stride
  int64_t T, batch_stride, row_stride;
  const void* w;
  const float* bias;  // null: absent
  Array y, pre;       // [M, N]
  bool pre_past_caches;  // whether pre, which backward reads much later, is written past them
  Epilogue epilogue;
  Activation activation;
  int64_t N, K;
};

struct LinearBlock {
  int64_t row, rows, column, columns;  // of y; `column` is the first of a panel
  int64_t runs;                        // of words of x, held at a time
};

struct LinearKernels {
  int64_t rows, columns;  // of a tile
  int64_t factors;        // of x and w in a word
  int64_t depth;          // the words of a run
  int64_t step;           // the words of a sum are a multiple of it
  int64_t blocks;         // that each of several threads gets at least, so that none waits long at the end
  int64_t most_rows;      // of a block
  bool past_caches;       // whether bf16 can be written past the caches
  void (*block)(const Linear&, const LinearBlock&, float* scratch);
};

}  // namespace insvp_fast
