// The convolutions on one job, for the vector width of the including file.
#pragma once
#include "conv.h"
#include "vec.h"

namespace {

using namespace insvp_fast;

// A tile has M channels and as many vectors as the registers hold sums, inputs and one weight of. One register stays
// free: with none to spare gcc keeps sums in memory.
constexpr int kRegisters = kWidth == 16 ? 32 : 16, kMost = kWidth == 16 ? 9 : 4;
constexpr int across(int channels) {
  return (kRegisters - 2) / (channels + 1) < 8 ? (kRegisters - 2) / (channels + 1) : 8;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline void read(float* __restrict__ to, Array from, int64_t offset, int64_t n) {
  if (from.type == DType::f32) copy(to, static_cast<const float*>(from.data) + offset, n, 1.0f);
  else copy(to, static_cast<const bf16*>(from.data) + offset, n, 1.0f);
}

inline void write(Array to, int64_t offset, const float* __restrict__ from, int64_t n) {
  if (to.type == DType::f32) copy(static_cast<float*>(to.data) + offset, from, n, 1.0f);
  else copy(static_cast<bf16*>(to.data) + offset, from, n, 1.0f);
}

inline void zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0;
}

// Image `b` of a map [B, C, H, W] that may be masked, from (top, left) on, with zeros around it.
struct Padded {
  Array x, mask;
  int64_t C, H, W, b, top, left;

  // n values of a row; `spare` has room for W
  void row(float* to, int64_t n, int64_t c, int64_t y, float* spare) const {
    const int64_t first = left < 0 ? least(-left, n) : 0, last = least(n, W - left);
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

template <int POOL>
inline void take_apart(float* to, int64_t distance, const float* row, int64_t n, int64_t pool) {
  if (POOL) pool = POOL;
  for (int64_t r = 0; r < pool; ++r)
    for (int64_t i = 0; i < n; ++i) to[r * distance + i] = row[i * pool + r];
}

// All phases and channels, [pool * pool, C, plane], `rows` rows of each.
inline void fill(float* to, const Padded& from, int64_t rows, int64_t stride, int64_t plane, int64_t pool,
                 float* spare) {
  float* row = spare + from.W + kSlack;
  const int64_t phase = from.C * plane;
  for (int64_t c = 0; c < from.C; ++c)
    for (int64_t y = 0; y < rows * pool; ++y) {
      float* out = to + y % pool * pool * phase + c * plane + y / pool * stride;
      from.row(pool == 1 ? out : row, stride * pool, c, y, spare);
      if (pool == 4) take_apart<4>(out, phase, row, stride, pool);
      else if (pool == 3) take_apart<3>(out, phase, row, stride, pool);
      else if (pool > 1) take_apart<0>(out, phase, row, stride, pool);
    }
  for (int64_t i = 0; i < pool * phase * pool; i += plane) zero(to + i + rows * stride, kSlack);
}

inline int64_t vectors(const ConvShape& s, const ConvLayout& l, int64_t rows) {
  return l.flat ? ((rows - 1) * l.stride + s.cols_out() + kWidth - 1) / kWidth
                : rows * ((s.cols_out() + kWidth - 1) / kWidth);
}

// ---------------------------------------------------------------------------------------------------------- forward

template <int M, int V>
inline void products(vec (&acc)[M][V], const float* x, const int32_t* offsets, int64_t taps, const float* w,
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
      for (int v = 0; v < V; ++v) acc[m][v] += w[m] * in[v];
  }
}

// M channels at `count` vectors: the sums, or of each window the first of the largest, and its place.
template <int M>
inline void correlate(const ConvFwd& a, const float* x, const float* w, const float* bias, int64_t count, float* out,
                      float* chosen) {
  constexpr int V = across(M);
  const int64_t taps = a.s.taps(), phases = a.s.pool * a.s.pool;
  for (int64_t i = 0; i < count; i += V) {
    int32_t p[V];
    for (int v = 0; v < V; ++v) p[v] = a.positions[least(i + v, count - 1)];
    vec best[M][V];
    products(best, x, a.offsets, taps, w, bias, p);
    if (phases > 1) {
      vec place[M][V], acc[M][V];
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) place[m][v] = vec{};
      for (int64_t phase = 1; phase < phases; ++phase) {
        products(acc, x, a.offsets + phase * taps, taps, w, bias, p);
        const vec here = vec{} + static_cast<float>(phase);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < V; ++v) {
            const auto take = (acc[m][v] > best[m][v]) | (acc[m][v] != acc[m][v]);  // a later NaN too, as torch does
            place[m][v] = take ? here : place[m][v];
            best[m][v] = take ? acc[m][v] : best[m][v];
          }
      }
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) store(chosen + m * a.l.out_plane + p[v], place[m][v]);
    }
    const vec slope = vec{} + a.negative_slope, none = vec{};
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) {
        const vec below = a.negative_slope == 0 ? none : slope * best[m][v];  // 0 for -infinity too
        store(out + m * a.l.out_plane + p[v], best[m][v] < none ? below : best[m][v]);
      }
  }
}

template <int M, class... Arguments>
inline void correlate_of(int64_t channels, Arguments... arguments) {
  if (channels == M) return correlate<M>(arguments...);
  if constexpr (M > 1) correlate_of<M - 1>(channels, arguments...);
}

void conv_fwd_job(const ConvFwd& a, int64_t job, float* scratch) {
  const ConvShape& s = a.s;
  const ConvLayout& l = a.l;
  const int64_t b = job / l.bands, first = job % l.bands * l.rows, rows = least(l.rows, s.rows_out() - first);
  float* x = scratch;
  float* out = x + s.pool * s.pool * s.C * l.plane + kSlack;
  float* chosen = out + a.block * l.out_plane;
  float* spare = chosen + (s.pool > 1 ? a.block * l.out_plane : 0);
  const Padded from{a.x, a.mask, s.C, s.H, s.W, b, s.top + first * s.pool, s.left};
  fill(x, from, rows + l.halo, l.stride, l.plane, s.pool, spare);
  for (int64_t o = 0; o < s.O; o += a.block) {
    const int64_t channels = least(a.block, s.O - o);
    correlate_of<kMost>(channels, a, x, a.w + o * s.taps(), a.bias ? a.bias + o : nullptr, vectors(s, l, rows), out,
                        chosen);
    for (int64_t m = 0; m < channels; ++m)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t to = ((b * s.O + o + m) * s.rows_out() + first + r) * s.cols_out();
        write(a.y, to, out + m * l.out_plane + r * l.stride, s.cols_out());
        const float* place = chosen + m * l.out_plane + r * l.stride;
        if (s.pool > 1)
          for (int64_t i = 0; i < s.cols_out(); ++i) a.chosen[to + i] = static_cast<uint8_t>(static_cast<int>(place[i]));
      }
  }
}

// ------------------------------------------------------------------------------------------- gradient by the weights

// dw[m, tap] += the sum over all positions of g[m] * x[tap]
template <int M>
inline void accumulate(const ConvWeights& a, float* dw, const float* g, const float* x, int64_t count) {
  constexpr int N = across(M);
  const int64_t taps = a.s.taps();
  for (int64_t first = 0; first < taps; first += N) {
    const float* at[N];
    for (int n = 0; n < N; ++n) at[n] = x + a.offsets[least(first + n, taps - 1)];
    vec acc[M][N] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t p = a.positions[i];
      vec in[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) in[n] = load(at[n] + p);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const vec gm = load(g + m * a.l.out_plane + p);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[m][n] += gm * in[n];
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        if (first + n < taps) dw[m * taps + first + n] += sum(acc[m][n]);
  }
}

template <int M, class... Arguments>
inline void accumulate_of(int64_t channels, Arguments&... arguments) {
  if (channels == M) return accumulate<M>(arguments...);
  if constexpr (M > 1) accumulate_of<M - 1>(channels, arguments...);
}

void conv_weights_job(const ConvWeights& a, int64_t job, float* scratch, float* dw, float* db) {
  const ConvShape& s = a.s;
  const ConvLayout& l = a.l;
  const int64_t b = job / l.bands, first = job % l.bands * l.rows, rows = least(l.rows, s.OH - first);
  const int64_t count = vectors(s, l, rows);
  float *x = scratch, *g = x + s.C * l.plane + kSlack, *spare = g + s.O * l.out_plane;
  fill(x, {a.x, {}, s.C, s.H, s.W, b, s.top + first, s.left}, rows + l.halo, l.stride, l.plane, 1, spare);
  fill(g, {a.grad, a.mask, s.O, s.OH, s.OW, b, first, 0}, rows, l.stride, l.out_plane, 1, spare);
  for (int64_t o = 0; o < s.O; o += a.block) {
    float* to = dw + o * s.taps();
    const float* from = g + o * l.out_plane;
    accumulate_of<kMost>(least(a.block, s.O - o), a, to, from, x, count);
  }
  for (int64_t o = 0; o < s.O; ++o) {
    vec acc = {};
    for (int64_t i = 0; i < count; ++i) acc += load(g + o * l.out_plane + a.positions[i]);
    db[o] += sum(acc);
  }
}

// ------------------------------------------------------------------------------------------- gradients behind pooling

// The gradients of one pooled row of channel o before pooling, and where their kernel windows begin in a map with
// `cols` columns, channels last, whose first row is that of the windows of pooled row `base`.
inline void gather(const ConvSparse& a, int64_t b, int64_t o, int64_t y, int64_t base, int64_t cols, float* g,
                   int32_t* at, float* spare) {
  const ConvShape& s = a.s;
  const int64_t n = s.cols_out(), offset = ((b * s.O + o) * s.rows_out() + y) * n;
  read(g, a.grad, offset, n);
  read(spare, a.y, offset, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t place = a.chosen[offset + i];
    g[i] = spare[i] > 0 ? g[i] : a.negative_slope * g[i];
    at[i] = static_cast<int32_t>((((y - base) * s.pool + place / s.pool) * cols + i * s.pool + place % s.pool) * s.C);
  }
}

void conv_sparse_weights_job(const ConvSparse& a, int64_t job, float* scratch, float* dw, float* db) {
  constexpr int N = 8;
  const ConvShape& s = a.s;
  const int64_t b = job / a.bands, first = job % a.bands * a.rows, rows = least(a.rows, s.rows_out() - first);
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
        const int64_t vector = least(t + k, total - 1);
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

void conv_sparse_input_job(const ConvSparse& a, int64_t b, float* scratch) {
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
  const int64_t before = s.left < 0 ? 0 : least(s.left, s.W);
  const int64_t skipped = s.left < 0 ? -s.left : 0;  // columns of the padding
  const int64_t inside = least(cols - skipped, s.W - before);
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t y = 0; y < s.H; ++y) {
      const float* from = d_x + ((y - s.top) * cols + skipped) * s.C + c;
      zero(row, s.W);
      if (y >= s.top && y - s.top < high)
        for (int64_t i = 0; i < inside; ++i) row[before + i] = from[i * s.C];
      write(a.d_x, ((b * s.C + c) * s.H + y) * s.W, row, s.W);
    }
}

constexpr ConvKernels kKernels = {kWidth, kMost, conv_fwd_job, conv_weights_job, conv_sparse_weights_job,
                                  conv_sparse_input_job};

}  // namespace
