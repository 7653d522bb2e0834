// The forward convolution of one job in matrix tiles, with max-pooling and operands rounded to bf16.
#pragma once
#include "common/amx.h"
#include "fwd.h"
#include "tiles.h"

namespace {

#ifdef INSVP_FAST_AMX
constexpr bool kHasTiles = true;
constexpr int kSums = 4;  // tiles of sums at once

// Fills a map [rows, cols, C] in bf16. Returns whether all of it is finite.
inline bool fill_rounded(bf16* to, const Padded& from, int64_t rows, int64_t cols, float* row, float* spare) {
  vec odd = {};  // becomes NaN where a number is not finite
  const int64_t C = from.C;
  for (int64_t y = 0; y < rows; ++y, to += cols * C)
    for (int64_t c = 0; c < C; ++c) {
      from.row(row, round_up(cols, kWidth), c, y, spare);
      bf16* out = to + c;
      for (int64_t i = 0; i < cols; i += kWidth) {
        bf16 numbers[kWidth];
        store(numbers, load(row + i));
        const vec rounded = load(numbers);
        odd += rounded - rounded;
        const int64_t n = smaller(kWidth, cols - i);
        for (int64_t k = 0; k < n; ++k, out += C) *out = numbers[k];
      }
    }
  return sum(odd) == 0;
}

// Calls f(constant<n>) for 0 <= n < N.
template <int N, class F>
inline void for_each_constant(F f) {
  if constexpr (N > 0) {
    for_each_constant<N - 1>(f);
    f(constant<N - 1>{});
  }
}

// The sums of 16 windows for TILES tiles of columns. `x` is where the first row of the map is that the first window
// reaches, `w` and `bias` are those of the first tile.
template <int TILES>
inline void tile_sums(float* sums, const ConvShape& s, const TileSizes& t, const bf16* x, const uint32_t* w,
                      const float* bias) {
  for_each_constant<TILES>([&](auto i) { load_tile<i.value>(bias + i.value * kTile, 0); });
  for (int64_t y = 0; y < s.KH; ++y, x += t.cols * s.C)
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk, w += t.columns * kTile) {
      load_tile_of_bytes<4>(x + chunk * kTileNumbers, s.pool * s.C * sizeof(bf16));
      for_each_constant<TILES>([&](auto i) {
        constexpr int weights = 5 + i.value % 3;
        load_tile<weights>(w + i.value * kTile * kTile, kTile);
        multiply_tile<i.value, 4, weights>();
      });
    }
  for_each_constant<TILES>([&](auto i) { store_tile<i.value>(sums + i.value * kTile, t.columns); });
}

// The largest sums of one window after LeakyReLU, and their places: an element for each channel, `stride` apart.
inline void largest_sums(const ConvFwd& a, const TileSizes& t, const float* sums, float* values, float* places,
                         int64_t stride) {
  const ConvShape& s = a.s;
  for (int64_t o = 0; o < s.O; o += kWidth) {
    vec best = {}, place = {};
    for (int64_t y = 0, phase = 0; y < s.pool; ++y)
      for (int64_t x = 0; x < s.pool; ++x, ++phase) {
        const vec sum = load(sums + y * kTile * t.columns + x * s.O + o);
        if (phase) keep_larger(best, place, sum, phase);
        else best = sum;
      }
    float value[kWidth], where[kWidth];
    store(value, leaky_relu(best, a.negative_slope));
    store(where, place);
    const int64_t n = smaller(kWidth, s.O - o);
    for (int64_t i = 0; i < n; ++i, values += stride, places += stride) *values = value[i], *places = where[i];
  }
}

// Returns false, with nothing done, where an input is not finite: numbers of the map are also multiplied by zeros.
bool conv_fwd_in_tiles(const ConvFwd& a, int64_t job, float* scratch) {
  const ConvShape& s = a.s;
  const int64_t b = job / a.l.bands, first = job % a.l.bands * a.l.rows, rows = smaller(a.l.rows, s.rows_out() - first);
  const TileSizes t(s);
  const TileScratch size(s, t, rows);
  const int64_t n = s.cols_out(), stride = round_up(n, kTile), map_rows = rows * s.pool + s.KH - 1;
  bf16* map = reinterpret_cast<bf16*>(scratch);
  float *sums = scratch + size.map, *values = sums + size.sums, *places = values + size.results;
  float *row = places + size.results, *spare = row + size.row;

  const Padded from{a.x, a.mask, s.C, s.H, s.W, b, s.top + first * s.pool, s.left};
  if (!fill_rounded(map, from, map_rows, t.cols, row, spare)) return false;
  __builtin_memset(map + map_rows * t.cols * s.C, 0, t.behind * sizeof(bf16));

  const TileShapes shapes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t x = 0; x < n; x += kTile) {
      for (int64_t y = 0; y < s.pool; ++y) {
        const bf16* at = map + ((r * s.pool + y) * t.cols + x * s.pool) * s.C;
        for (int64_t c = 0; c < t.columns; c += kSums * kTile)
          with_constant<kSums>(smaller(kSums, (t.columns - c) / kTile), [&](auto count) {
            tile_sums<count.value>(sums + y * kTile * t.columns + c, s, t, at, a.tiles.pairs + c * kTile,
                                   a.tiles.bias + c);
          });
      }
      for (int64_t i = 0; i < kTile; ++i)
        largest_sums(a, t, sums + i * t.columns, values + x + i, places + x + i, stride);
    }
    for (int64_t o = 0; o < s.O; ++o) {
      const int64_t to = ((b * s.O + o) * s.rows_out() + first + r) * n;
      write(a.y, to, values + o * stride, n);
      write_places(a.indices + to, places + o * stride, n);
    }
  }
  return true;
}
#else
constexpr bool kHasTiles = false;

inline bool conv_fwd_in_tiles(const ConvFwd&, int64_t, float*) { return false; }
#endif

}  // namespace
