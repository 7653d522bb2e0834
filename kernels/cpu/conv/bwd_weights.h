// The gradient of the weights without pooling, of one job.
#pragma once
#include "pairs.h"
#include "tile.h"

namespace {

// dw[m, tap] += the sum over all positions of g[m] * x[tap]
template <int M, class Number>
inline void accumulate(const ConvBwdWeights& a, float* dw, const Number* g, const Number* x, int64_t count) {
  constexpr int N = across(M), kNumbers = sizeof(float) / sizeof(Number);  // of a word
  const int64_t taps = a.s.taps();
  for (int64_t first = 0; first < taps; first += N) {
    const Number* at[N];
    for (int n = 0; n < N; ++n) at[n] = x + a.offsets[smaller(first + n, taps - 1)];
    vec acc[M][N] = {};
    for (int64_t i = 0; i < count; i += kNumbers) {
      const int64_t p = a.positions[i];
      Words<Number> in[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) in[n] = load_words(at[n] + p);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Words<Number> gm = load_words(g + m * a.l.out_plane + p);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m][n] = mul_add(acc[m][n], gm, in[n]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        if (first + n < taps) dw[m * taps + first + n] += sum(acc[m][n]);
  }
}

template <Rounded by>
void conv_bwd_weights_in_vectors(const ConvBwdWeights& a, int64_t job, float* scratch, float* dw, float* db) {
  const ConvShape& s = a.s;
  const ConvLayout& l = a.l;
  const int64_t b = job / l.bands, first = job % l.bands * l.rows, rows = smaller(l.rows, s.OH - first);
  const int64_t count = vectors(s, l, rows);
  float *x = scratch, *g = x + s.C * l.plane + kSlack, *spare = g + s.O * l.out_plane;
  fill(x, {a.x, {}, s.C, s.H, s.W, b, s.top + first, s.left}, rows + l.halo, l.stride, l.plane, 1, spare);
  fill(g, {a.grad, a.mask, s.O, s.OH, s.OW, b, first, 0}, rows, l.stride, l.out_plane, 1, spare);
  for (int64_t o = 0; o < s.O; ++o) {
    vec acc = {};
    for (int64_t i = 0; i < count; ++i) acc += load(g + o * l.out_plane + a.positions[i]);
    db[o] += sum(acc);
  }
  const auto compute = [&](const auto* grad, const auto* map) {
    for (int64_t o = 0; o < s.O; o += a.block)
      with_constant<kChannels>(smaller(a.block, s.O - o), [&](auto M) {
        accumulate<M.value>(a, dw + o * s.taps(), grad + o * l.out_plane, map, count);
      });
  };
  if constexpr (by == Rounded::pairs) {
    const int64_t of_grad = rows * l.stride + kSlack, of_map = of_grad + l.halo * l.stride;
    if (a.rounded == Rounded::pairs && finite_when_rounded(g, s.O, l.out_plane, of_grad) &&
        finite_when_rounded(x, s.C, l.plane, of_map))
      return compute(narrow_in_place(g, s.O, l.out_plane, of_grad), narrow_in_place(x, s.C, l.plane, of_map));
  }
  compute(g, x);
}

}  // namespace
