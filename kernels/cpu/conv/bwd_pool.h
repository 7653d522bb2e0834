// The gradients through max-pooling, of one job.
#pragma once
#include "input.h"

namespace {

// The gradients g of pooled row y of channel o before pooling, and where their kernel windows begin (`at`): in a map
// with `cols` columns, channels last, whose first row is the first one of the windows of pooled row `base`.
inline void gather(const ConvPoolBwd& a, int64_t b, int64_t o, int64_t y, int64_t base, int64_t cols, float* g,
                   int32_t* at, float* spare) {
  const ConvShape& s = a.s;
  const int64_t n = s.cols_out(), offset = ((b * s.O + o) * s.rows_out() + y) * n;
  read(g, a.grad, offset, n);
  read(spare, a.y, offset, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t place = a.indices[offset + i];
    g[i] = spare[i] > 0 ? g[i] : a.negative_slope * g[i];
    at[i] = static_cast<int32_t>((((y - base) * s.pool + place / s.pool) * cols + i * s.pool + place % s.pool) * s.C);
  }
}

void conv_pool_bwd_weights_job(const ConvPoolBwd& a, int64_t job, float* scratch, float* dw, float* db) {
  constexpr int N = 8;
  const ConvShape& s = a.s;
  const int64_t b = job / a.bands, first = job % a.bands * a.rows, rows = smaller(a.rows, s.rows_out() - first);
  const int64_t cols = s.OW + s.KW - 1, n = s.cols_out(), count = rows * n;
  const int64_t chunks = a.chunk / kWidth, total = s.KH * chunks;
  float* x = scratch;
  float* g = x + (a.rows * s.pool + s.KH - 1) * cols * s.C + a.chunk;
  int32_t* at = reinterpret_cast<int32_t*>(g + a.rows * n);
  float *spare = g + 2 * a.rows * n, *row = spare + s.W + s.OW;

  const Padded from{a.x, {}, s.C, s.H, s.W, b, s.top + first * s.pool, s.left};
  for (int64_t y = 0; y < rows * s.pool + s.KH - 1; ++y)
    for (int64_t c = 0; c < s.C; ++c) {
      from.row(row, cols, c, y, spare);
      for (int64_t i = 0; i < cols; ++i) x[(y * cols + i) * s.C + c] = row[i];
    }
  for (int64_t o = 0; o < s.O; ++o, dw += total * kWidth) {
    for (int64_t r = 0; r < rows; ++r) gather(a, b, o, first + r, first, cols, g + r * n, at + r * n, spare);
    for (int64_t i = 0; i < count; ++i) db[o] += g[i];
    for (int64_t t = 0; t < total; t += N) {
      const float* window[N];
      for (int k = 0; k < N; ++k) {
        const int64_t vector = smaller(t + k, total - 1);
        window[k] = x + vector / chunks * cols * s.C + vector % chunks * kWidth;
      }
      vec acc[N] = {};
      for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
        for (int k = 0; k < N; ++k) acc[k] += g[i] * load(window[k] + at[i]);
#pragma GCC unroll 8
      for (int k = 0; k < N; ++k)
        if (t + k < total) store(dw + (t + k) * kWidth, load(dw + (t + k) * kWidth) + acc[k]);
    }
  }
}

void conv_pool_bwd_input_job(const ConvPoolBwd& a, int64_t b, float* scratch) {
  const ConvShape& s = a.s;
  const int64_t high = s.OH + s.KH - 1, cols = s.OW + s.KW - 1, n = s.cols_out();
  float* d_x = scratch;
  float* g = d_x + high * cols * s.C + a.chunk;
  int32_t* at = reinterpret_cast<int32_t*>(g + n);
  float* row = g + 2 * n;
  zero(d_x, high * cols * s.C + a.chunk);
  for (int64_t y = 0; y < s.rows_out(); ++y)
    for (int64_t o = 0; o < s.O; ++o) {
      gather(a, b, o, y, 0, cols, g, at, row);
      for (int64_t i = 0; i < n; ++i) {
        const float* w = a.w + o * s.KH * a.chunk;
        for (int64_t k = 0; k < s.KH; ++k, w += a.chunk) {
          float* to = d_x + at[i] + k * cols * s.C;
          for (int64_t j = 0; j < a.chunk; j += kWidth) store(to + j, load(to + j) + g[i] * load(w + j));
        }
      }
    }
  const int64_t before = s.left < 0 ? 0 : smaller(s.left, s.W);
  const int64_t skipped = s.left < 0 ? -s.left : 0;  // columns of the padding
  const int64_t inside = smaller(cols - skipped, s.W - before);
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t y = 0; y < s.H; ++y) {
      zero(row, s.W);
      if (y >= s.top && y - s.top < high) {
        const float* from = d_x + ((y - s.top) * cols + skipped) * s.C + c;
        for (int64_t i = 0; i < inside; ++i) row[before + i] = from[i * s.C];
      }
      write(a.d_x, ((b * s.C + c) * s.H + y) * s.W, row, s.W);
    }
}

}  // namespace
