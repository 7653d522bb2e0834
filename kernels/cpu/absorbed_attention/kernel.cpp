// The arithmetic of absorbed_attention on a few rows, or a few tokens, of one image.
#include "absorbed_attention.h"
#include "common/array.h"
#include "common/exp.h"
#include "common/sizes.h"

namespace {

using namespace insvp_fast;

static_assert(kWidth <= kLine);  // of which the scratch has whole ones

template <class T>
inline const T* at(Array a, int64_t offset) {
  return static_cast<const T*>(a.data) + offset;
}

// to[r * S + s] = rows[r] . x[s] for `TOKENS` tokens s
template <int ROWS, int TOKENS, class T>
inline void multiply(float* to, int64_t S, const float* rows, int64_t stride, const T* x, int64_t E) {
  vec acc[ROWS][TOKENS] = {};
  for (int64_t e = 0; e < E; e += kWidth) {
    vec token[TOKENS];
#pragma GCC unroll 4
    for (int s = 0; s < TOKENS; ++s) token[s] = load_some(x + s * E + e, E - e);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const vec row = load(rows + r * stride + e);
#pragma GCC unroll 4
      for (int s = 0; s < TOKENS; ++s) acc[r][s] += row * token[s];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int s = 0; s < TOKENS; ++s) to[r * S + s] = sum(acc[r][s]);
}

// to[r * stride + e] = the sum over s of weights[r * S + s] * x[s, e], for `VECTORS` vectors of e
template <int ROWS, int VECTORS, class T>
inline void add_up(float* to, int64_t stride, const float* weights, int64_t S, int64_t keys, const T* x, int64_t E,
                   int64_t left) {
  vec acc[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < keys; ++s) {
    vec token[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) token[v] = load_some(x + s * E + v * kWidth, left - v * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) acc[r][v] += weights[r * S + s] * token[v];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(to + r * stride + v * kWidth, acc[r][v]);
}

// products -> their softmax
inline void soften(float* row, int64_t count, float scale) {
  float most = -__builtin_inff();
  for (int64_t s = 0; s < count; ++s) {
    row[s] *= scale;  // stored, as the rounding of a product that is subtracted while it is made would remain
    most = row[s] > most ? row[s] : most;
  }
  vec totals = {};
  for (int64_t s = 0; s < count; s += kWidth) {
    const vec e = exp(load_some(row + s, count - s) - most);
    store_some(row + s, e, count - s);
    totals += first_of(e, count - s);
  }
  const float total = sum(totals);
  for (int64_t s = 0; s < count; ++s) row[s] /= total;
}

// gradients of the softmax -> those of the products
inline void soften_bwd(float* row, const float* softmax, int64_t count, float scale) {
  vec totals = {};
  for (int64_t s = 0; s < count; s += kWidth)
    totals += load_some(row + s, count - s) * load_some(softmax + s, count - s);
  const float total = sum(totals);
  for (int64_t s = 0; s < count; ++s) row[s] = scale * softmax[s] * (row[s] - total);
}

template <class T>
void compute_rows(const AbsorbedRows& a, int64_t image, int64_t first, int64_t count, float* scratch) {
  const int64_t S = a.S, E = a.E, stride = round_up(E, kTogether * kWidth);
  const int64_t keys = a.num_keys ? a.num_keys[image] : S;
  float *rows = scratch, *weights = rows + kRows * stride, *softmax = weights + kRows * whole_lines(S);
  const T* x = at<T>(a.x, image * S * E);
  __builtin_memset(rows, 0, kRows * stride * sizeof(float));
  for (int64_t r = 0; r < count; ++r) read(rows + r * stride, a.rows, (image * a.R + first + r) * E, E);

  with_constant<kRows>(count, [&](auto height) {
    int64_t s = 0;
    for (; s + kTogether <= keys; s += kTogether)
      multiply<height.value, kTogether>(weights + s, S, rows, stride, x + s * E, E);
    for (; s < keys; ++s) multiply<height.value, 1>(weights + s, S, rows, stride, x + s * E, E);
  });
  for (int64_t r = 0; r < count; ++r) {
    float* row = weights + r * S;
    const int64_t offset = (image * a.R + first + r) * S;
    if (a.softmax.data) {
      read(softmax, a.softmax, offset, keys);
      soften_bwd(row, softmax, keys, a.scale);
    } else {
      soften(row, keys, a.scale);
    }
    for (int64_t s = keys; s < S; ++s) row[s] = 0.0f;
    write(a.weights, offset, row, S);
  }
  with_constant<kRows>(count, [&](auto height) {
    for (int64_t e = 0; e < E; e += kTogether * kWidth)
      with_constant<kTogether>(smaller(kTogether, ceil_div(E - e, kWidth)), [&](auto width) {
        add_up<height.value, width.value>(rows + e, stride, weights, S, keys, x + e, E, E - e);
      });
  });
  for (int64_t r = 0; r < count; ++r) write(a.means, (image * a.R + first + r) * E, rows + r * stride, E);
}

// d_x for `TOKENS` tokens from `s` on, `VECTORS` vectors of each from `e` on. `weights` are the tokens' columns of
// softmax and d_scores, [R, 2, TOKENS].
template <int TOKENS, int VECTORS, class T>
inline void spread(const AbsorbedTokens& a, int64_t image, int64_t s, int64_t e, const float* weights) {
  vec acc[TOKENS][VECTORS] = {};
  const T *d_means = at<T>(a.d_means, image * a.R * a.E), *rows = at<T>(a.rows, image * a.R * a.E);
  for (int64_t r = 0; r < a.R; ++r, weights += 2 * TOKENS)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t i = e + v * kWidth;
      const vec d_mean = load_some(d_means + r * a.E + i, a.E - i), row = load_some(rows + r * a.E + i, a.E - i);
#pragma GCC unroll 4
      for (int j = 0; j < TOKENS; ++j) acc[j][v] += weights[j] * d_mean + weights[TOKENS + j] * row;
    }
  for (int j = 0; j < TOKENS; ++j)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t i = e + v * kWidth;
      vec sum = acc[j][v];
      if (s + j < a.T) sum += read(a.d_first, (image * a.T + s + j) * a.E + i, a.E - i);
      write(a.d_x, (image * a.S + s + j) * a.E + i, sum, a.E - i);
    }
}

template <class T>
void compute_tokens(const AbsorbedTokens& a, int64_t image, int64_t first, int64_t count, float* scratch) {
  const T *softmax = at<T>(a.softmax, image * a.R * a.S), *d_scores = at<T>(a.d_scores, image * a.R * a.S);
  for (int64_t s = first; s < first + count; s += kTogether)
    with_constant<kTogether>(smaller(kTogether, first + count - s), [&](auto tokens) {
      constexpr int n = tokens.value;
      for (int64_t r = 0; r < a.R; ++r)
        for (int64_t j = 0; j < n; ++j) {
          scratch[(2 * r) * n + j] = widen(softmax[r * a.S + s + j]);
          scratch[(2 * r + 1) * n + j] = widen(d_scores[r * a.S + s + j]);
        }
      for (int64_t e = 0; e < a.E; e += 2 * kWidth)
        with_constant<2>(smaller(2, ceil_div(a.E - e, kWidth)),
                         [&](auto vectors) { spread<n, vectors.value, T>(a, image, s, e, scratch); });
    });
}

void rows(const AbsorbedRows& a, int64_t image, int64_t first, int64_t count, float* scratch) {
  if (a.x.type == DType::f32) compute_rows<float>(a, image, first, count, scratch);
  else compute_rows<bf16>(a, image, first, count, scratch);
}

void tokens(const AbsorbedTokens& a, int64_t image, int64_t first, int64_t count, float* scratch) {
  if (a.d_x.type == DType::f32) compute_tokens<float>(a, image, first, count, scratch);
  else compute_tokens<bf16>(a, image, first, count, scratch);
}

}  // namespace

template <>
const AbsorbedKernels& insvp_fast::kernels_for<AbsorbedKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr AbsorbedKernels kernels{rows, tokens};
  return kernels;
}
