// Convolution with max-pooling as a product in matrix tiles: the sizes of its operands.
//
// A row of the first operand is the part of a row of the map, channels last, that a row of a pooling window reaches:
// (KW + pool - 1) * C numbers in bf16. Those of 16 neighboring windows are a tile, which is read from the map itself. The
// columns of the second operand are the weights of all channels at the first place in a row of the window, then at the
// second one, and so on. The sum runs over KH rows of the map.
#pragma once
#include "common/sizes.h"
#include "conv.h"

namespace {

using namespace insvp_fast;

constexpr int64_t kTileRows = 16, kTileNumbers = 32;  // of bf16 in a row of a tile

struct TileSizes {
  int64_t chunks;   // of a row of the map
  int64_t columns;  // whole tiles
  int64_t weights;  // words: [KH, chunks, tiles of columns, 16, 16], of two numbers each; zeros where there is no weight
  int64_t cols;     // of the map
  int64_t behind;   // numbers behind the last row of the map that are read
  explicit TileSizes(const ConvShape& s)
      : chunks(ceil_div((s.KW + s.pool - 1) * s.C, kTileNumbers)),
        columns(round_up(s.pool * s.O, kTileRows)),
        weights(s.KH * chunks * columns * kTileRows),
        cols(s.OW + s.KW - 1),
        behind(kTileRows * s.pool * s.C + chunks * kTileNumbers) {}
};

// The scratch of a job of `rows` pooled rows, in floats: its part of the map, the sums of a row of 16 windows, the
// results of a pooled row, a row of the map and one of its mask.
struct TileScratch {
  int64_t map, sums, results, row, all;
  TileScratch(const ConvShape& s, const TileSizes& t, int64_t rows)
      : map(whole_lines(ceil_div((rows * s.pool + s.KH - 1) * t.cols * s.C + t.behind, 2))),
        sums(s.pool * kTileRows * t.columns + kLine),
        results(s.O * round_up(s.cols_out(), kTileRows)),
        row(round_up(t.cols, kLine)),
        all(map + sums + 2 * results + row + whole_lines(s.W)) {}
};

}  // namespace
