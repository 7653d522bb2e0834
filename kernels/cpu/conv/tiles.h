// A convolution as a product in matrix tiles: the sizes of its operands.
//
// A window is a window of max-pooling or, without pooling, a few neighbors in a row. A row of the first operand is the
// part of a row of the map, channels last, that a row of a window reaches, in bf16. Those of 16 neighboring windows are
// a tile, which is read from the map itself. The columns of the second operand are the weights of all channels at the
// first place in a row of the window, then at the second one, and so on. The sum runs over KH rows of the map.
#pragma once
#include "common/sizes.h"
#include "conv.h"

namespace {

using namespace insvp_fast;

constexpr int64_t kTileRows = 16, kTileNumbers = 32;  // of bf16 in a row of a tile
constexpr int kSums = 4;                              // tiles of sums at once

struct TileSizes {
  int64_t across;   // places in a row of a window
  int64_t windows;  // in a row of the output
  int64_t chunks;   // tiles that a row of the map takes for a window
  int64_t columns;  // whole tiles
  int64_t weights;  // pairs of numbers, [KH, chunks, tiles of columns, 16, 16]; zeros where there is no weight
  int64_t cols;     // of the map
  int64_t behind;   // numbers behind the last row of the map that are read
  explicit TileSizes(const ConvShape& s)
      : across(s.pool > 1 ? s.pool : larger(1, kTileRows / larger(1, s.O))),
        windows(ceil_div(s.OW, across)),
        chunks(ceil_div(((s.KW - 1) * s.dilation + across) * s.C, kTileNumbers)),
        columns(round_up(across * s.O, kTileRows)),
        weights(s.KH * chunks * columns * kTileRows),
        cols(s.OW + (s.KW - 1) * s.dilation),
        behind(kTileRows * across * s.C + chunks * kTileNumbers) {}
};

// The scratch of a job of `rows` pooled rows, in floats: its part of the map, the sums of 16 windows or, without
// pooling, of several times 16, a row of results, one of the places of maxima, a row of the map and one of its mask.
struct TileScratch {
  int64_t map_rows, map, sums, stride, results, row, all;
  TileScratch(const ConvShape& s, const TileSizes& t, int64_t rows)
      : map_rows(rows * s.pool + (s.KH - 1) * s.dilation),
        map(whole_lines(ceil_div(map_rows * t.cols * s.C + t.behind, 2))),
        sums(larger(s.pool, kSums) * kTileRows * t.columns + kLine),
        stride(round_up(t.windows, kTileRows) * (s.pool > 1 ? 1 : t.across)),
        results(s.O * stride),
        row(round_up(t.cols, kLine)),
        all(map + sums + 2 * results + row + whole_lines(s.W)) {}
};

// The scratch of a job of the gradient of the weights, in floats: rows of the gradient in bf16, with rows of zeros
// around them, and the rows of the map as pairs of neighbors, each pair a word; then the sums of four tiles and of the
// bias, a row of the map and one of its mask.
struct WeightTiles {
  int64_t map_rows, pitch, map_pitch, grad, pairs, row, all;
  WeightTiles(const ConvShape& s, int64_t rows)
      : map_rows(rows + s.KH - 1),
        pitch(round_up(s.OW, kTileNumbers)),
        map_pitch(pitch + round_up(s.KW, kTileNumbers)),
        grad(((map_rows + s.KH) * s.O + 2 * kTileRows) * pitch / 2),
        pairs(s.C * map_rows * map_pitch),
        row(map_pitch + kLine),
        all(grad + pairs + 4 * kTileRows * kTileRows + whole_lines(s.O) + row + whole_lines(larger(s.W, s.OW))) {}
};

// Whether to round factors that may be rounded: where tiles take fewer cycles for an output than vectors of fp32. They
// take about 25 for a product of tiles, whose operands often begin inside of a cache line, and a few to round and turn
// each number of the map, and to turn results without pooling. Where there are pairs, the rule is the same.
inline bool rounding_pays(const ConvShape& s) {
  const TileSizes t(s);
  const double products = 25.0 * s.KH * t.chunks * t.columns / (kTileRows * kTileRows * t.across);
  const double vectors = s.KH * s.KW * s.C * s.O / 32.0;
  return products + 2.5 * s.C + (s.pool > 1 ? 0 : 1.5 * s.O) < vectors;
}
inline bool rounding_weights_pays(const ConvShape& s) { return s.dilation == 1 && rounding_pays(s); }

}  // namespace
