// The division of a convolution into jobs, and the layout of their scratch.
#pragma once
#include "common/host.h"
#include "conv.h"

namespace {

inline const ConvKernels& kernels() { return best_kernels<ConvKernels>(isa()); }

constexpr int64_t kBudget = 128 * 1024;  // floats of a job's scratch, which then stays in the second-level cache
constexpr int64_t kFewestRows = 4;       // of a job; with fewer, its halo would cost more than they do
constexpr int64_t kJobs = 8;             // wanted for few images, where that cannot follow from the threads

// As many rows as the budget holds, in jobs of one size but the last, and about `wanted` jobs where rows are enough.
inline int64_t rows_of_job(int64_t rows, int64_t floats_of_row, int64_t floats_of_halo, int64_t wanted = 1) {
  const int64_t most = larger(kFewestRows, (kBudget - floats_of_halo) / floats_of_row);
  return ceil_div(rows, larger(ceil_div(rows, most), smaller(wanted, rows / kFewestRows)));
}

// `out_channels` is the number of output channels in the scratch of a job; `width` places are computed together; an
// image has about `wanted` jobs where it can.
inline ConvLayout layout(const ConvShape& s, int64_t out_channels, int64_t width, int64_t wanted = 1) {
  ConvLayout l{};
  const int64_t planes = s.pool * s.pool * s.C, cols = s.cols_out();
  l.width = width;
  const int64_t padded = cols + ceil_div((s.KW - 1) * s.dilation, s.pool);
  l.halo = ceil_div((s.KH - 1) * s.dilation, s.pool);
  l.flat = padded < round_up(cols, width);
  l.stride = l.flat ? padded : odd_lines(larger(padded, round_up(cols, width)));
  l.rows = rows_of_job(s.rows_out(), (planes + out_channels) * l.stride, planes * l.halo * l.stride, wanted);
  l.bands = ceil_div(s.rows_out(), l.rows);
  l.plane = whole_lines((l.rows + l.halo) * l.stride + kSlack);
  l.out_plane = whole_lines(l.rows * l.stride + kSlack);
  return l;
}

// What a job needs beside its maps: a row of the mask, and an input row that is not split yet.
inline int64_t spare_floats(const ConvShape& s, const ConvLayout& l) {
  return larger(s.W, s.OW) + kSlack + s.pool * l.stride;
}

// Whether places in a job's maps are integers of 32 bits, as the kernels take them.
inline bool has_places(const ConvShape& s, const ConvLayout& l) {
  return l.plane <= INT32_MAX / (s.pool * s.pool * s.C + 1);
}

// The number of vectors of a job, at most.
inline int64_t most_positions(const ConvShape& s, const ConvLayout& l) {
  return (l.rows * ceil_div(larger(l.stride, s.cols_out()), l.width) + 1) * (l.width / kernels().width);
}

// Where the vectors of a job begin in a plane.
inline void list_positions(int32_t* to, const ConvShape& s, const ConvLayout& l) {
  const int64_t width = kernels().width, n = most_positions(s, l), across = round_up(s.cols_out(), l.width) / width;
  for (int64_t i = 0; i < n; ++i)
    to[i] = static_cast<int32_t>(l.flat ? i * width : i / across * l.stride + i % across * width);
}

// For each phase, where a tap (channel, row, column) finds its input, for every `step`-th channel.
inline void list_offsets(int32_t* to, const ConvShape& s, const ConvLayout& l, int64_t step = 1) {
  for (int64_t phase = 0; phase < s.pool * s.pool; ++phase)
    for (int64_t c = 0; c < s.C; c += step)
      for (int64_t i = 0; i < s.KH; ++i)
        for (int64_t j = 0; j < s.KW; ++j) {
          const int64_t y = phase / s.pool + i * s.dilation, x = phase % s.pool + j * s.dilation;
          const int64_t plane = (y % s.pool * s.pool + x % s.pool) * s.C + c;
          *to++ = static_cast<int32_t>(plane * l.plane + y / s.pool * l.stride + x / s.pool);
        }
}

// The size of equal blocks of channels, none larger than the registers hold.
inline int64_t block_of(int64_t channels) {
  return ceil_div(channels, ceil_div(larger(channels, 1), kernels().channels));
}

inline int32_t* take_integers(Workspace& memory, int64_t n) {
  return reinterpret_cast<int32_t*>(memory.take(whole_lines(n)));
}

}  // namespace
