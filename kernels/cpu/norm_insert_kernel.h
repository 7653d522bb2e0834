// norm_insert on a range of rows, for the vector width of the including file. A row stays in the first-level cache.
#pragma once
#include "array.h"
#include "norm_insert.h"

namespace {

using namespace insvp_fast;

// The sum of term(vectors at i) over a row; the last elements, fewer than a vector, come in one padded with zeros.
template <class Term>
inline float reduce(int64_t n, Term term) {
  vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    sums[0] += term(i, kWidth);
    sums[1] += term(i + kWidth, kWidth);
  }
  for (; i < n; i += kWidth) sums[0] += term(i, n - i < kWidth ? n - i : kWidth);
  return sum(sums[0] + sums[1]);
}

inline vec load_some(const float* p, int64_t n) {
  if (n == kWidth) return load(p);
  float some[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}

inline void store_some(float* p, vec v, int64_t n) {
  if (n == kWidth) return store(p, v);
  float some[kWidth];
  store(some, v);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

// f(i, n) for all elements of a row, n <= kWidth at a time.
template <class F>
inline void for_each(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) f(i, int64_t(kWidth));
  if (i < size) f(i, size - i);
}

inline void add(float* x, const float* y, int64_t D) {
  for_each(D, [&](int64_t i, int64_t n) { store_some(x + i, load_some(x + i, n) + load_some(y + i, n), n); });
}

void norm_insert_fwd_rows(const NormInsertFwd& a, int64_t first, int64_t last, float* scratch) {
  const int64_t S = a.T + a.L, D = a.D;
  float *x = scratch, *other = scratch + D;
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / S, s = row % S;
    if (s < a.T) {
      const int64_t place = (b * a.T + s) * D;
      read(x, a.residual, place, D, 1.0f);
      if (a.branch.data) {
        read(other, a.branch, place, D, 1.0f);
        add(x, other, D);
        write(a.total, place, x, D, 1.0f);
      }
    } else {
      read(x, a.prompts, b * a.prompts_stride + (s - a.T) * D, D, 1.0f);
    }
    const float mean = reduce(D, [&](int64_t i, int64_t n) { return load_some(x + i, n); }) / D;
    for_each(D, [&](int64_t i, int64_t n) { store_some(x + i, load_some(x + i, n) - mean, n); });
    const float variance = reduce(D, [&](int64_t i, int64_t n) {
      const vec v = load_some(x + i, n);
      return v * v;
    });
    const float rstd = 1.0f / __builtin_sqrtf(variance / D + a.eps);
    a.rstd[row] = rstd;
    if (!a.weight) {
      write(a.normed, row * D, x, D, rstd);
      continue;
    }
    write(a.xhat, row * D, x, D, rstd);
    for_each(D, [&](int64_t i, int64_t n) {
      const vec y = load_some(x + i, n) * rstd * load_some(a.weight + i, n);
      store_some(x + i, a.bias ? y + load_some(a.bias + i, n) : y, n);
    });
    write(a.normed, row * D, x, D, 1.0f);
  }
}

void norm_insert_bwd_rows(const NormInsertBwd& a, int64_t first, int64_t last, float* scratch) {
  const int64_t S = a.T + a.L, D = a.D;
  float *g = scratch, *xhat = scratch + D;
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / S, s = row % S;
    read(g, a.grad_normed, row * D, D, 1.0f);
    read(xhat, a.xhat, row * D, D, 1.0f);
    if (a.weight)
      for_each(D, [&](int64_t i, int64_t n) { store_some(g + i, load_some(g + i, n) * load_some(a.weight + i, n), n); });
    const float mean = reduce(D, [&](int64_t i, int64_t n) { return load_some(g + i, n); }) / D;
    const float along = reduce(D, [&](int64_t i, int64_t n) { return load_some(g + i, n) * load_some(xhat + i, n); }) / D;
    const float rstd = a.rstd[row];
    for_each(D, [&](int64_t i, int64_t n) {
      store_some(g + i, rstd * (load_some(g + i, n) - mean - along * load_some(xhat + i, n)), n);
    });
    if (s >= a.T) {
      write(a.d_prompts, (b * a.L + s - a.T) * D, g, D, 1.0f);
      continue;
    }
    const int64_t place = (b * a.T + s) * D;
    if (a.grad_total.data) {
      read(xhat, a.grad_total, place, D, 1.0f);
      add(g, xhat, D);
    }
    write(a.d_residual, place, g, D, 1.0f);
    if (a.d_branch.data) write(a.d_branch, place, g, D, 1.0f);
  }
}

}  // namespace
