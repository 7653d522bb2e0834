// Copying the part of a map that a job reads into its scratch.
#pragma once
#include "common/array.h"
#include "common/sizes.h"
#include "conv.h"

namespace {

using namespace insvp_fast;

inline void zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0;
}

// A vector rounded to bf16; `odd` becomes NaN where a number is then not finite.
inline vec rounded(const float* from, vec& odd) {
  const vec v = rounded(load(from));
  odd += v - v;
  return v;
}

// Image `b` of a map [B, C, H, W], masked if `mask` is there, from (top, left) on, with zeros around it.
struct Padded {
  Array x, mask;
  int64_t C, H, W, b, top, left;

  // The first n values of row y; `spare` has room for W.
  void row(float* to, int64_t n, int64_t c, int64_t y, float* spare) const {
    const int64_t first = left < 0 ? smaller(-left, n) : 0, last = smaller(n, W - left);
    if (top + y < 0 || top + y >= H || last <= first) return zero(to, n);
    const int64_t offset = ((b * C + c) * H + top + y) * W + left + first;
    zero(to, first);
    read(to + first, x, offset, last - first);
    if (mask.data) {
      read(spare, mask, offset, last - first);
      for (int64_t i = first; i < last; ++i) to[i] = spare[i - first] <= 0 ? 0 : to[i];
    }
    zero(to + last, n - last);
  }
};

// Splits a row into `pool` rows with every pool-th value, `distance` apart. POOL is `pool` if known, or 0.
template <int POOL>
inline void split(float* to, int64_t distance, const float* row, int64_t n, int64_t pool) {
  if (POOL) pool = POOL;
  for (int64_t r = 0; r < pool; ++r)
    for (int64_t i = 0; i < n; ++i) to[r * distance + i] = row[i * pool + r];
}

// Fills all phases and channels, [pool * pool, C, plane], with `rows` rows each.
inline void fill(float* to, const Padded& from, int64_t rows, int64_t stride, int64_t plane, int64_t pool,
                 float* spare) {
  float* row = spare + from.W + kSlack;
  const int64_t phase = from.C * plane;
  for (int64_t c = 0; c < from.C; ++c)
    for (int64_t y = 0; y < rows * pool; ++y) {
      float* out = to + y % pool * pool * phase + c * plane + y / pool * stride;
      from.row(pool == 1 ? out : row, stride * pool, c, y, spare);
      if (pool == 4) split<4>(out, phase, row, stride, pool);
      else if (pool == 3) split<3>(out, phase, row, stride, pool);
      else if (pool > 1) split<0>(out, phase, row, stride, pool);
    }
  for (int64_t i = 0; i < pool * phase * pool; i += plane) zero(to + i + rows * stride, kSlack);
}

// The number of vectors in `rows` output rows of a channel.
inline int64_t vectors(const ConvShape& s, const ConvLayout& l, int64_t rows) {
  const int64_t cols = s.cols_out();
  return (l.flat ? round_up((rows - 1) * l.stride + cols, l.width) : rows * round_up(cols, l.width)) / kWidth;
}

}  // namespace
