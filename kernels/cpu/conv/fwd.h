// The forward convolution of one job.
#pragma once
#include "pairs.h"
#include "tile.h"

namespace {

// The sums of M channels at V vectors.
template <class Word, int M, int V>
inline void products(vec (&acc)[M][V], const float* x, const int32_t* offsets, int64_t taps, const Word* w,
                     const float* bias, const int32_t (&p)[V]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = vec{} + (bias ? bias[m] : 0.0f);
  for (int64_t t = 0; t < taps; ++t, w += M) {
    const float* at = x + offsets[t];
    vec in[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) in[v] = load(at + p[v]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = mul_add(acc[m][v], w[m], in[v]);
  }
}

// Keeps the larger of `best`, whose place in the window is `place`, and the later `sum`; also a later NaN, as in torch.
inline void keep_larger(vec& best, vec& place, vec sum, int64_t phase) {
  const vec here = vec{} + static_cast<float>(phase);
  const auto take = (sum > best) | (sum != sum);
  place = take ? here : place;
  best = take ? sum : best;
}

inline vec leaky_relu(vec x, float negative_slope) {
  const vec none = {}, below = negative_slope == 0 ? none : negative_slope * x;  // 0, not NaN, for -infinity
  return x < none ? below : x;
}

// M channels at `count` vectors: the sums or, with pooling, the maximum of each window and the place of the first one.
template <int M, class Word>
inline void correlate(const ConvFwd& a, const Taps<Word>& taps, int64_t channel, const float* x, int64_t count,
                      float* out, float* indices) {
  constexpr int V = across(M);
  const int64_t phases = a.s.pool * a.s.pool;
  const Word* w = taps.w + channel * taps.count;
  const float* bias = a.bias ? a.bias + channel : nullptr;
  for (int64_t i = 0; i < count; i += V) {
    int32_t p[V];
    for (int v = 0; v < V; ++v) p[v] = a.positions[smaller(i + v, count - 1)];
    vec best[M][V];
    products(best, x, taps.offsets, taps.count, w, bias, p);
    if (phases > 1) {
      vec place[M][V], acc[M][V];
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) place[m][v] = vec{};
      for (int64_t phase = 1; phase < phases; ++phase) {
        products(acc, x, taps.offsets + phase * taps.count, taps.count, w, bias, p);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < V; ++v) keep_larger(best[m][v], place[m][v], acc[m][v], phase);
      }
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) store(indices + m * a.l.out_plane + p[v], place[m][v]);
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) store(out + m * a.l.out_plane + p[v], leaky_relu(best[m][v], a.negative_slope));
  }
}

inline void write_places(uint8_t* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(static_cast<int>(from[i]));
}

template <Rounded by>
void conv_fwd_in_vectors(const ConvFwd& a, int64_t job, float* scratch) {
  const ConvShape& s = a.s;
  const ConvLayout& l = a.l;
  const int64_t b = job / l.bands, first = job % l.bands * l.rows, rows = smaller(l.rows, s.rows_out() - first);
  float* x = scratch;
  float* out = x + s.pool * s.pool * s.C * l.plane + kSlack;
  float* indices = out + a.block * l.out_plane;
  float* spare = indices + (s.pool > 1 ? a.block * l.out_plane : 0);
  const Padded from{a.x, a.mask, s.C, s.H, s.W, b, s.top + first * s.pool, s.left};
  fill(x, from, rows + l.halo, l.stride, l.plane, s.pool, spare);
  const auto compute = [&](const auto& taps) {
    for (int64_t o = 0; o < s.O; o += a.block) {
      const int64_t channels = smaller(a.block, s.O - o), count = vectors(s, l, rows);
      with_constant<kChannels>(channels, [&](auto M) { correlate<M.value>(a, taps, o, x, count, out, indices); });
      for (int64_t m = 0; m < channels; ++m)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t to = ((b * s.O + o + m) * s.rows_out() + first + r) * s.cols_out();
          write(a.y, to, out + m * l.out_plane + r * l.stride, s.cols_out());
          if (s.pool > 1) write_places(a.indices + to, indices + m * l.out_plane + r * l.stride, s.cols_out());
        }
    }
  };
  if constexpr (by == Rounded::pairs)
    if (a.pairs.w && pair_channels(x, s, l, rows + l.halo)) return compute(a.pairs);
  compute(a.taps);
}

}  // namespace
