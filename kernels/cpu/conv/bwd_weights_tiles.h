// The gradient of the weights without pooling in matrix tiles, of one job, with factors rounded to bf16.
//
// For a row of the map it is a product: a row of the first operand is a row of the gradient, of one channel, that a row
// of the kernel brings together with the row of the map; the columns of the second one are the columns of the kernel.
// The sum runs along the row.
#pragma once
#include "bwd_weights.h"
#include "common/amx.h"
#include "common/bf16_pairs.h"
#include "tiles.h"

namespace {

#ifdef INSVP_FAST_AMX

// to[i] = the numbers i and i + 1 of a row, as a pair. `from` has a number more than there are pairs in whole vectors.
inline void write_pairs(uint32_t* to, const float* from, int64_t n, vec& odd) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const bits32 pairs = joined(rounded(from + i, odd), rounded(from + i + 1, odd));
    __builtin_memcpy(to + i, &pairs, sizeof pairs);
  }
}

// Returns false, with nothing added, where a factor is not finite.
bool conv_bwd_weights_in_tiles(const ConvBwdWeights& a, int64_t job, float* scratch, float* dw, float* db) {
  const ConvShape& s = a.s;
  const int64_t b = job / a.l.bands, first = job % a.l.bands * a.l.rows, rows = smaller(a.l.rows, s.OH - first);
  const WeightTiles t(s, rows);
  bf16* grad = reinterpret_cast<bf16*>(scratch);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch + t.grad);
  float *sums = scratch + t.grad + t.pairs, *bias = sums + 4 * kTile * kTile, *row = bias + whole_lines(s.O);
  float* spare = row + t.row;
  vec odd = {};

  const Padded x{a.x, {}, s.C, s.H, s.W, b, s.top + first, s.left};
  for (int64_t y = 0; y < t.map_rows; ++y)
    for (int64_t c = 0; c < s.C; ++c) {
      zero(row, t.row);
      x.row(row, s.OW + s.KW - 1, c, y, spare);
      write_pairs(pairs + (c * t.map_rows + y) * t.map_pitch, row, t.map_pitch, odd);
    }
  const Padded g{a.grad, a.mask, s.O, s.OH, s.OW, b, first, 0};
  __builtin_memset(grad, 0, t.grad * sizeof(float));
  zero(bias, s.O);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < s.O; ++o) {
      zero(row, t.pitch);
      g.row(row, s.OW, o, r, spare);
      vec total = {};
      for (int64_t i = 0; i < t.pitch; i += kWidth) {
        store(grad + ((r + s.KH - 1) * s.O + o) * t.pitch + i, rounded(row + i, odd));
        total += load(row + i);
      }
      bias[o] += sum(total);
    }
  if (!(sum(odd) == 0)) return false;
  for (int64_t o = 0; o < s.O; ++o) db[o] += bias[o];

  const TileShapes shapes;
  const int64_t products = s.KH * s.O, words = t.pitch / 2, stride = 2 * kTile;
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t m = 0; m < products; m += stride)
      for (int64_t n = 0; n < s.KW; n += stride) {
        with_tiles(products - m, s.KW - n, [&](auto down, auto across) {
          for (int64_t y = 0; y < t.map_rows; ++y) {
            const uint32_t* from = reinterpret_cast<const uint32_t*>(grad) + (y * s.O + m) * words;
            const uint32_t* to = pairs + (c * t.map_rows + y) * t.map_pitch + n;
            multiply_tiles<down.value, across.value, Once::no>({sums, stride}, {from, words}, {to, 2}, words, y > 0,
                                                               [] {});
          }
        });
        for (int64_t q = m; q < smaller(products, m + stride); ++q) {
          float* to = dw + ((q % s.O * s.C + c) * s.KH + s.KH - 1 - q / s.O) * s.KW;
          for (int64_t j = n; j < smaller(s.KW, n + stride); ++j) to[j] += sums[(q - m) * stride + j - n];
        }
      }
  return true;
}

#else
inline bool conv_bwd_weights_in_tiles(const ConvBwdWeights&, int64_t, float*, float*, float*) { return false; }
#endif

}  // namespace
