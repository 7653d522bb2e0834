// What linear.cpp and the files of the instruction sets agree on.
//
// y = x @ w + bias, with M rows, K terms to sum, N columns. Operands are held in words of 32 bits: one fp32 factor, or
// two neighbouring bf16 factors where the instruction set multiplies pairs. w is packed in panels, as wide as a tile of
// y that the registers hold; in each panel word row after word row. The words of x are taken in runs of kDepth: a run
// of a panel stays in the first-level cache while the rows of a block, held in the second level, pass by.
#pragma once
#include "common.h"

namespace insvp_fast {

constexpr int64_t kDepth = 128;              // words that are summed before the sums leave the registers
constexpr int64_t kRowStride = kDepth + 16;  // an odd number of cache lines: the rows fall into different cache sets

enum class Epilogue : int { none, gelu, gelu_bwd };  // the codes are part of the C ABI

struct Linear {
  Array x;  // row m at (m / T) * batch_stride + (m % T) * row_stride
  int64_t T, batch_stride, row_stride;
  const void* w;
  const float* bias;  // null: absent
  Array y, pre;       // [M, N]
  Epilogue epilogue;
  int64_t N, K;
};

struct LinearBlock {
  int64_t row, rows, column, columns;  // of y; `column` is the first of a panel
  int64_t runs;                        // of words of x that are held at a time
};

struct LinearKernels {
  int64_t rows, columns;  // of a tile
  int64_t factors;        // of x and w in a word
  void (*block)(const Linear&, const LinearBlock&, float* scratch);
};

extern const LinearKernels linear_generic, linear_avx2, linear_avx512, linear_avx512_bf16;

}  // namespace insvp_fast
