// The forward convolution of one job in matrix tiles, with operands rounded to bf16.
#pragma once
#include "common/amx.h"
#include "fwd.h"
#include "tiles.h"

namespace {

#ifdef INSVP_FAST_AMX
static_assert(kTileRows == kTile);  // which files without the instruction set do not know

// Fills a map [rows, cols, C] in bf16. Returns whether all of it is finite.
inline bool fill_rounded(bf16* to, const Padded& from, int64_t rows, int64_t cols, float* row, float* spare) {
  vec odd = {};
  const int64_t C = from.C;
  for (int64_t y = 0; y < rows; ++y, to += cols * C)
    for (int64_t c = 0; c < C; ++c) {
      from.row(row, round_up(cols, kWidth), c, y, spare);
      bf16* out = to + c;
      for (int64_t i = 0; i < cols; i += kWidth) {
        bf16 numbers[kWidth];
        store(numbers, rounded(row + i, odd));
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

// The sums of ROWS times 16 windows, whose first inputs are `step` numbers apart, for TILES tiles of columns: a tile
// alone would wait for its own sums. `w` and `bias` are those of the first tile.
template <int ROWS, int TILES>
inline void tile_sums(float* sums, const ConvShape& s, const TileSizes& t, const bf16* x, int64_t step,
                      const uint32_t* w, const float* bias) {
  const auto for_each_sum = [](auto f) {
    for_each_constant<ROWS>([&](auto r) { for_each_constant<TILES>([&](auto i) { f(r, i); }); });
  };
  for_each_sum([&](auto r, auto i) { load_tile<r.value * TILES + i.value>(bias + i.value * kTile, 0); });
  for (int64_t y = 0; y < s.KH; ++y, x += s.dilation * t.cols * s.C)
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk, w += t.columns * kTile)
      for_each_sum([&](auto r, auto i) {
        constexpr int from = kSums + r.value % 2, weights = kSums + 2 + i.value % 2;
        if constexpr (i.value == 0)
          load_tile_of_bytes<from>(x + r.value * step + chunk * kTileNumbers, t.across * s.C * sizeof(bf16));
        if constexpr (r.value == 0 || TILES > 2) load_tile<weights>(w + i.value * kTile * kTile, kTile);
        multiply_tile<r.value * TILES + i.value, from, weights>();
      });
  for_each_sum([&](auto r, auto i) {
    store_tile<r.value * TILES + i.value>(sums + r.value * kTile * t.columns + i.value * kTile, t.columns);
  });
}

// The same for all columns and any number of rows.
inline void all_tile_sums(float* sums, const ConvFwd& a, const TileSizes& t, const bf16* x, int64_t step,
                          int64_t rows) {
  for (int64_t c = 0; c < t.columns; c += kSums * kTile)
    with_constant<kSums>(smaller(kSums, (t.columns - c) / kTile), [&](auto tiles) {
      constexpr int most = kSums / tiles.value;
      for (int64_t r = 0; r < rows; r += most)
        with_constant<most>(smaller(most, rows - r), [&](auto count) {
          tile_sums<count.value, tiles.value>(sums + r * kTile * t.columns + c, a.s, t, x + r * step, step,
                                              a.tiles.pairs + c * kTile, a.tiles.bias + c);
        });
    });
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

// The sums of one window after LeakyReLU: its places follow one another, the channels are `stride` apart.
inline void all_sums(const ConvFwd& a, const TileSizes& t, float* sums, float* values, int64_t stride) {
  for (int64_t n = 0; n < t.columns; n += kWidth) store(sums + n, leaky_relu(load(sums + n), a.negative_slope));
  for (int64_t x = 0; x < t.across; ++x, ++values, sums += a.s.O)
    for (int64_t o = 0; o < a.s.O; ++o) values[o * stride] = sums[o];
}

// Returns false, with nothing written but scratch, where an input is not finite: numbers of the map are also multiplied
// by zeros.
bool conv_fwd_in_tiles(const ConvFwd& a, int64_t job, float* scratch) {
  const ConvShape& s = a.s;
  const int64_t b = job / a.l.bands, first = job % a.l.bands * a.l.rows, rows = smaller(a.l.rows, s.rows_out() - first);
  const TileSizes t(s);
  const TileScratch size(s, t, rows);
  const int64_t stride = size.stride;
  bf16* map = reinterpret_cast<bf16*>(scratch);
  float *sums = scratch + size.map, *values = sums + size.sums, *places = values + size.results;
  float *row = places + size.results, *spare = row + size.row;

  const Padded from{a.x, a.mask, s.C, s.H, s.W, b, s.top + first * s.pool, s.left};
  if (!fill_rounded(map, from, size.map_rows, t.cols, row, spare)) return false;
  __builtin_memset(map + size.map_rows * t.cols * s.C, 0, t.behind * sizeof(bf16));

  const TileShapes shapes;
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* at = map + r * s.pool * t.cols * s.C;
    const int64_t window = t.across * s.C, most = s.pool > 1 ? kTile : kSums * kTile;
    for (int64_t x = 0; x < t.windows; x += most) {
      const int64_t n = smaller(most, t.windows - x);
      if (s.pool > 1) all_tile_sums(sums, a, t, at + x * window, t.cols * s.C, s.pool);
      else all_tile_sums(sums, a, t, at + x * window, kTile * window, ceil_div(n, kTile));
      for (int64_t i = 0; i < n; ++i) {
        float* own = sums + i * t.columns;
        if (s.pool > 1) largest_sums(a, t, own, values + x + i, places + x + i, stride);
        else all_sums(a, t, own, values + (x + i) * t.across, stride);
      }
    }
    for (int64_t o = 0; o < s.O; ++o) {
      const int64_t to = ((b * s.O + o) * s.rows_out() + first + r) * s.cols_out();
      write(a.y, to, values + o * stride, s.cols_out());
      if (s.pool > 1) write_places(a.indices + to, places + o * stride, s.cols_out());
    }
  }
  return true;
}
#else
inline bool conv_fwd_in_tiles(const ConvFwd&, int64_t, float*) { return false; }
#endif

}  // namespace
