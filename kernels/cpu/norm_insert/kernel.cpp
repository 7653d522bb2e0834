// The arithmetic of norm_insert on a range of rows. A row stays in the first-level cache.
#include "common/array.h"
#include "norm_insert.h"

namespace {

using namespace insvp_fast;

// Prefetch a line of the next row, which may be in another page of memory: there the processor's own prefetching ends.
inline void expect_read(Array from, int64_t at) {
  if (from.data) __builtin_prefetch(static_cast<const char*>(from.data) + at * size_of(from.type), 0);
}
inline void expect_write(Array to, int64_t at) {
  if (to.data) __builtin_prefetch(static_cast<const char*>(to.data) + at * size_of(to.type), 1);
}

// The arguments are copied: as nothing points to the copy, no store can change it, and the compiler chooses by dtype
// outside the loops. With `flatten` it also makes no calls in them.
__attribute__((flatten)) void norm_insert_fwd_rows(const NormInsertFwd& args, int64_t first, int64_t last, float* x) {
  const NormInsertFwd a = args;
  const int64_t S = a.T + a.L, D = a.D;
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / S, s = row % S, token = (b * a.T + s) * D;
    const bool next_is_token = s + 1 < a.T;
    vec total = {};
    if (s < a.T) {
      for_each_vector(D, [&](int64_t i, int64_t n) {
        vec v = read(a.residual, token + i, n);
        if (a.branch.data) write(a.total, token + i, v += read(a.branch, token + i, n), n);
        store_some(x + i, v, n);
        total += v;
      });
    } else {
      const int64_t prompt = b * a.prompts_stride + (s - a.T) * D;
      for_each_vector(D, [&](int64_t i, int64_t n) {
        const vec v = read(a.prompts, prompt + i, n);
        store_some(x + i, v, n);
        total += v;
      });
    }
    const float mean = a.center ? sum(total) / D : 0.0f;
    vec squares = {};
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const vec v = first_of(load_some(x + i, n) - mean, n);
      squares += v * v;
      if (next_is_token) {
        expect_read(a.residual, token + D + i);
        expect_read(a.branch, token + D + i);
        expect_write(a.total, token + D + i);
      }
      expect_write(a.normed, (row + 1) * D + i);
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / D + a.eps);
    a.rstd[row] = rstd;
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const vec v = (load_some(x + i, n) - mean) * rstd;
      if (!a.weight) return write(a.normed, row * D + i, v, n);
      write(a.xhat, row * D + i, v, n);
      const vec y = v * load_some(a.weight + i, n);
      write(a.normed, row * D + i, a.bias ? y + load_some(a.bias + i, n) : y, n);
    });
  }
}

__attribute__((flatten)) void norm_insert_bwd_rows(const NormInsertBwd& args, int64_t first, int64_t last, float* g) {
  const NormInsertBwd a = args;
  const int64_t S = a.T + a.L, D = a.D;
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / S, s = row % S, token = (b * a.T + s) * D, prompt = (b * a.L + s - a.T) * D;
    const bool next_is_token = s + 1 < a.T;
    vec sums = {}, products = {};
    for_each_vector(D, [&](int64_t i, int64_t n) {
      vec v = read(a.grad_normed, row * D + i, n);
      if (a.weight) v *= load_some(a.weight + i, n);
      store_some(g + i, v, n);
      sums += v;
      products += v * read(a.xhat, row * D + i, n);
      expect_read(a.grad_normed, (row + 1) * D + i);
      expect_read(a.xhat, (row + 1) * D + i);
      if (next_is_token) {
        expect_read(a.grad_total, token + D + i);
        expect_write(a.d_residual, token + D + i);
        expect_write(a.d_branch, token + D + i);
      }
    });
    const float mean = a.center ? sum(sums) / D : 0.0f, along = sum(products) / D, rstd = a.rstd[row];
    for_each_vector(D, [&](int64_t i, int64_t n) {
      vec v = rstd * (load_some(g + i, n) - mean - along * read(a.xhat, row * D + i, n));
      if (s >= a.T) return write(a.d_prompts, prompt + i, v, n);
      if (a.grad_total.data) v += read(a.grad_total, token + i, n);
      write(a.d_residual, token + i, v, n);
      if (a.d_branch.data) write(a.d_branch, token + i, v, n);
    });
  }
}

}  // namespace

template <>
const NormInsertKernels& insvp_fast::kernels_for<NormInsertKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr NormInsertKernels kernels{norm_insert_fwd_rows, norm_insert_bwd_rows};
  return kernels;
}
