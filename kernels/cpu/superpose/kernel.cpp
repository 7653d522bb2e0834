// The arithmetic of superpose on one tile of patches.
//
// Both layers are products with a matrix [R, K] whose rows are contiguous: `project` sums over K, `expand` over R, and
// `accumulate` is the weight gradient of either. Rows without a patch are zeros and add nothing.
#include "common/array.h"
#include "superpose.h"

namespace {

using namespace insvp_fast;

struct Tile {
  int64_t first, count;
  int64_t corner[kTile];  // offset of each patch's first pixel in an image tensor

  Tile(const Geometry& g, int64_t first, int64_t count) : first(first), count(count) {
    const int64_t columns = g.W / g.P;
    for (int64_t m = 0; m < count; ++m) {
      const int64_t b = (first + m) / g.N, n = (first + m) % g.N;
      corner[m] = b * g.C * g.H * g.W + n / columns * g.P * g.W + n % columns * g.P;
    }
  }
};

// Clears a tile outside its [count, K] part: a NaN there would spread from one patch to the next.
inline void clear_rest(float* x, const Tile& t, const Geometry& g) {
  for (int64_t m = 0; m < kTile; ++m)
    for (int64_t k = m < t.count ? g.K : 0; k < g.width; ++k) x[m * g.stride + k] = 0;
}

// Calls row(offset in the tile, offset in the image) for each pixel row of the patches, in the order of the image.
template <class Row>
inline void for_each_row(const Tile& t, const Geometry& g, Row row) {
  for (int64_t c = 0; c < g.C; ++c)
    for (int64_t i = 0; i < g.P; ++i)
      for (int64_t m = 0; m < t.count; ++m)
        row(m * g.stride + (c * g.P + i) * g.P, t.corner[m] + (c * g.H + i) * g.W);
}

inline void unfold(float* x, Array image, const Tile& t, const Geometry& g, float scale) {
  for_each_row(t, g, [&](int64_t to, int64_t from) { read(x + to, image, from, g.P, scale); });
  clear_rest(x, t, g);
}

inline void fold(Array image, const float* x, const Tile& t, const Geometry& g, float scale) {
  for_each_row(t, g, [&](int64_t from, int64_t to) { write(image, to, x + from, g.P, scale); });
}

// to[i] = [to[i] +] x[i] where the patch prompt is kept, else 0 * x[i]
template <bool ADD>
inline void keep(float* to, const float* x, const uint8_t* kept, const Tile& t, const Geometry& g) {
  for_each_row(t, g, [&](int64_t row, int64_t from) {
    for (int64_t i = 0; i < g.P; ++i)
      to[row + i] = (ADD ? to[row + i] : 0.0f) + static_cast<float>(kept[from + i]) * x[row + i];
  });
}

template <int ROWS>
inline void project_rows(float* out, const float* x, const float* w, const Geometry& g) {
  constexpr int M = 3;  // M * ROWS sums and the operands fill 16 registers
  static_assert(kTile % M == 0);
  for (int64_t m = 0; m < kTile; m += M, x += M * g.stride, out += M * g.ld) {
    vec acc[M][ROWS] = {};
    for (int64_t k = 0; k < g.width; k += kWidth)
      for (int r = 0; r < ROWS; ++r) {
        const vec wk = load(w + r * g.stride + k);
        for (int j = 0; j < M; ++j) acc[j][r] += load(x + j * g.stride + k) * wk;
      }
    for (int j = 0; j < M; ++j)
      for (int r = 0; r < ROWS; ++r) out[j * g.ld + r] = sum(acc[j][r]);
  }
}

// out[m, r] = sum over k of x[m, k] * w[r, k]
inline void project(float* out, const float* x, const float* w, const Geometry& g) {
  int64_t r = 0;
  for (; r + 4 <= g.R; r += 4) project_rows<4>(out + r, x, w + r * g.stride, g);
  for (; r < g.R; ++r) project_rows<1>(out + r, x, w + r * g.stride, g);
}

// x[m, k] += sum over r < rows of h[m, r] * w[r, k]
inline void expand(float* x, const float* h, const float* w, int64_t rows, const Geometry& g) {
  constexpr int M = 6;
  static_assert(kTile % M == 0);
  for (int64_t k = 0; k < g.width; k += 2 * kWidth)
    for (int64_t m = 0; m < kTile; m += M) {
      float* xk = x + m * g.stride + k;
      vec acc[M][2];
      for (int j = 0; j < M; ++j) {
        acc[j][0] = load(xk + j * g.stride);
        acc[j][1] = load(xk + j * g.stride + kWidth);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const vec w0 = load(w + r * g.stride + k), w1 = load(w + r * g.stride + k + kWidth);
        for (int j = 0; j < M; ++j) {
          const float hr = h[(m + j) * g.ld + r];
          acc[j][0] += hr * w0;
          acc[j][1] += hr * w1;
        }
      }
      for (int j = 0; j < M; ++j) {
        store(xk + j * g.stride, acc[j][0]);
        store(xk + j * g.stride + kWidth, acc[j][1]);
      }
    }
}

template <int ROWS>
inline void accumulate_rows(float* dw, const float* h, const float* x, const Geometry& g) {
  for (int64_t k = 0; k < g.width; k += 2 * kWidth) {
    vec acc[ROWS][2];
    for (int r = 0; r < ROWS; ++r) {
      acc[r][0] = load(dw + r * g.stride + k);
      acc[r][1] = load(dw + r * g.stride + k + kWidth);
    }
    for (int m = 0; m < kTile; ++m) {
      const vec x0 = load(x + m * g.stride + k), x1 = load(x + m * g.stride + k + kWidth);
      for (int r = 0; r < ROWS; ++r) {
        acc[r][0] += h[m * g.ld + r] * x0;
        acc[r][1] += h[m * g.ld + r] * x1;
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      store(dw + r * g.stride + k, acc[r][0]);
      store(dw + r * g.stride + k + kWidth, acc[r][1]);
    }
  }
}

// dw[r, k] += sum over m of h[m, r] * x[m, k]
inline void accumulate(float* dw, const float* h, const float* x, int64_t rows, const Geometry& g) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) accumulate_rows<4>(dw + r * g.stride, h + r, x, g);
  for (; r < rows; ++r) accumulate_rows<1>(dw + r * g.stride, h + r, x, g);
}

void superpose_fwd_tile(const SuperposeFwd& a, int64_t first, int64_t count, float* scratch) {
  const Geometry& g = a.g;
  const Tile tile(g, first, count);
  float *x = scratch, *p = x + kTile * g.stride, *h = p + kTile * g.stride;

  unfold(x, a.image, tile, g, 1.0f);
  project(h, x, a.w1, g);
  for (int64_t m = 0; m < kTile; ++m) {
    for (int64_t r = 0; r < g.R; ++r) {
      const float z = h[m * g.ld + r] + a.b1[r];
      h[m * g.ld + r] = z < 0 ? 0 : z;  // keeps a NaN, as torch's relu does
    }
    h[m * g.ld + g.R] = 1.0f;  // the factor of the bias, w2's last row
  }
  if (a.global_prompt.data) {
    unfold(p, a.global_prompt, tile, g, a.global_weight);
    for (int64_t i = 0; i < kTile * g.stride; i += kWidth) store(x + i, load(x + i) + load(p + i));
  }
  if (a.kept) {
    __builtin_memset(p, 0, kTile * g.stride * sizeof(float));
    expand(p, h, a.w2, g.R + 1, g);
    keep<true>(x, p, a.kept, tile, g);
  } else {
    expand(x, h, a.w2, g.R + 1, g);
  }
  for (int64_t m = 0; m < count; ++m) {
    write(a.tokens, (first + m) * g.K, x + m * g.stride, g.K);
    __builtin_memcpy(a.hidden + (first + m) * g.R, h + m * g.ld, g.R * sizeof(float));
  }
}

void superpose_bwd_tile(const SuperposeBwd& a, int64_t first, int64_t count, float* scratch, const Partial& sums) {
  const Geometry& g = a.g;
  const Tile tile(g, first, count);
  float *grad = scratch, *x = grad + kTile * g.stride, *h = x + kTile * g.stride, *dh = h + kTile * g.ld;

  for (int64_t m = 0; m < count; ++m) {
    read(grad + m * g.stride, a.grad, (first + m) * g.K, g.K);
    __builtin_memcpy(h + m * g.ld, a.hidden + (first + m) * g.R, g.R * sizeof(float));
    h[m * g.ld + g.R] = 1.0f;  // makes dw2's last row db2
  }
  clear_rest(grad, tile, g);
  __builtin_memset(h + count * g.ld, 0, (kTile - count) * g.ld * sizeof(float));
  if (a.d_global.data) fold(a.d_global, grad, tile, g, a.global_weight);

  const float* d_patch = grad;
  if (a.kept) {
    keep<false>(x, grad, a.kept, tile, g);
    clear_rest(x, tile, g);
    d_patch = x;
  }
  project(dh, d_patch, a.w2, g);
  for (int64_t m = 0; m < kTile; ++m)
    for (int64_t r = 0; r < g.R; ++r)
      if (h[m * g.ld + r] <= 0) dh[m * g.ld + r] = 0;  // for a NaN the gradient stays, as in torch's relu

  accumulate(sums.dw2, h, d_patch, g.R + 1, g);
  unfold(x, a.image, tile, g, 1.0f);
  accumulate(sums.dw1, dh, x, g.R, g);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t r = 0; r < g.R; ++r) sums.db1[r] += dh[m * g.ld + r];
  if (a.d_image.data) {
    expand(grad, dh, a.w1, g.R, g);
    fold(a.d_image, grad, tile, g, 1.0f);
  }
}

}  // namespace

template <>
const SuperposeKernels& insvp_fast::kernels_for<SuperposeKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr SuperposeKernels kernels{superpose_fwd_tile, superpose_bwd_tile};
  return kernels;
}
