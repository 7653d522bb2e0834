// What linear.cpp and the files of the instruction sets agree on.
//
// y = x @ w + bias, with M rows, K terms to sum, N columns. w is packed for the product: K in blocks of kDepth; in each
// block the columns in panels, as wide as the registers of an instruction set hold; in each panel row after row. So a
// panel stays in the first-level cache while the rows of x, held in the second level, pass by.
#pragma once
#include "common.h"

namespace insvp_fast {

constexpr int64_t kDepth = 256;
constexpr int64_t kRowStride = kDepth + 16;  // an odd number of cache lines: the rows fall into different cache sets

struct LinearBlock {
  const float* x;  // [rows, kRowStride], the first `depth` of each row are used
  const float* w;  // the panels of these columns, of `depth` rows each
  const float* bias;  // null: absent
  float* y;  // [rows, columns], rows y_stride apart
  int64_t rows, depth, columns, y_stride;
  bool first;  // y starts from the bias; otherwise the products are added to it
};

struct LinearKernels {
  int64_t rows, columns;  // of y computed together in registers; a panel has as many columns
  void (*block)(const LinearBlock&);
};

extern const LinearKernels linear_generic, linear_avx2, linear_avx512;

}  // namespace insvp_fast
