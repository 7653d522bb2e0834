// The vector idiom of the kernels: the compiler's vector types, kWidth floats wide, for every instruction set alike.
// The including file defines INSVP_FAST_WIDTH and is compiled with the flags that make this width native.
#pragma once
#include <cstdint>

namespace {

constexpr int kWidth = INSVP_FAST_WIDTH;
typedef float vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t bits32 __attribute__((vector_size(4 * kWidth)));
typedef uint16_t bits16 __attribute__((vector_size(2 * kWidth)));
typedef uint16_t bf16;

inline vec load(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline vec load(const bf16* p) {
  bits16 high;
  __builtin_memcpy(&high, p, sizeof high);
  return (vec)(__builtin_convertvector(high, bits32) << 16);
}

// Rounds to nearest even; a NaN is replaced, because rounding could carry its mantissa into infinity.
inline void store(bf16* p, vec v) {
  const bits32 bits = (bits32)v;
  const bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bits32 nan = rounded * 0u + 0x7fc0u;
  const bits16 high = __builtin_convertvector(v == v ? rounded : nan, bits16);
  __builtin_memcpy(p, &high, sizeof high);
}

inline float sum(vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

// to[i] = scale * from[i] with conversion. The last vector may overlap the one before, so the two must not alias.
template <class To, class From>
inline void copy(To* __restrict__ to, const From* __restrict__ from, int64_t n, float scale) {
  if (n < kWidth) {
    From in[kWidth] = {};
    To out[kWidth];
    for (int64_t i = 0; i < n; ++i) in[i] = from[i];
    store(out, scale * load(in));
    for (int64_t i = 0; i < n; ++i) to[i] = out[i];
    return;
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, scale * load(from + i));
  if (i < n) store(to + n - kWidth, scale * load(from + n - kWidth));
}

}  // namespace
