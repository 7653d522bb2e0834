// Vectors of kWidth floats in the compiler's own vector types: one source for every instruction set.
// INSVP_FAST_WIDTH comes from the build, with the flags that make this width native.
#pragma once
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common/bf16.h"

namespace {

constexpr int kWidth = INSVP_FAST_WIDTH;
typedef float vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t bits32 __attribute__((vector_size(4 * kWidth)));
typedef uint16_t bits16 __attribute__((vector_size(2 * kWidth)));

inline vec load(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline vec load(const bf16* p) {
  bits16 high;
  __builtin_memcpy(&high, p, sizeof high);
#ifdef INSVP_FAST_BF16_PAIRS
  // gcc would make two halves of __builtin_convertvector, and warn of the form without a mask
  return (vec)((bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)high) << 16);
#else
  return (vec)(__builtin_convertvector(high, bits32) << 16);
#endif
}

inline void store(bf16* p, vec v) {
#ifdef INSVP_FAST_BF16_PAIRS
  const __m256bh high = _mm512_cvtneps_pbh((__m512)v);  // a denormal number becomes 0, as in products of pairs
#else
  const bits16 high = __builtin_convertvector(rounded_to_bf16(v, (bits32)v), bits16);
#endif
  __builtin_memcpy(p, &high, sizeof high);
}

// The elements rounded to bf16.
inline vec rounded(vec v) {
  bf16 numbers[kWidth];
  store(numbers, v);
  return load(numbers);
}

// For each element, all bits if it is one of the first n, else none.
inline bits32 is_one_of_the_first(int64_t n) {
  bits32 place;
  for (int i = 0; i < kWidth; ++i) place[i] = i;
  return (bits32)(place < static_cast<uint32_t>(n > 0 ? n : 0));
}

// The first n elements, or all if n is larger; zeros in the others.
inline vec first_of(vec v, int64_t n) { return n < kWidth ? (vec)((bits32)v & is_one_of_the_first(n)) : v; }

// The first n values, or a whole vector if n is larger; zeros in the other elements.
template <class T>
inline vec load_some(const T* from, int64_t n) {
  if (n >= kWidth) return load(from);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == sizeof(float)) return (vec)_mm512_maskz_loadu_ps(n > 0 ? (1u << n) - 1 : 0, from);
#elif defined __AVX2__
  if constexpr (sizeof(T) == sizeof(float)) return (vec)_mm256_maskload_ps(from, (__m256i)is_one_of_the_first(n));
#endif
  T part[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load(part);
}

template <class T>
inline void store_some(T* to, vec v, int64_t n) {
  if (n >= kWidth) return store(to, v);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_mask_storeu_ps(to, n > 0 ? (1u << n) - 1 : 0, (__m512)v);
#elif defined __AVX2__
  if constexpr (sizeof(T) == sizeof(float)) return _mm256_maskstore_ps(to, (__m256i)is_one_of_the_first(n), (__m256)v);
#endif
  T part[kWidth];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

// 1 / x with a relative error of 2^-14 or less.
inline vec rough_reciprocal(vec x) {
#ifdef __AVX512F__
  return (vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // gcc would warn of the form without a mask
#else
  return 1.0f / x;
#endif
}

// Calls f(i, n) for each vector of a row; n of its elements are in the row.
template <class F>
inline void for_each_vector(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) f(i, int64_t(kWidth));
  if (i < size) f(i, size - i);
}

// Adds the halves of a vector until one element is left. Every size is a constant, so all stays in registers.
template <int N>
inline float sum(const float (&lane)[N]) {
  if constexpr (N == 1) {
    return lane[0];
  } else {
    float half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = lane[i] + lane[i + N / 2];
    return sum(half);
  }
}

inline float sum(vec v) {
  float lane[kWidth];
  store(lane, v);
  return sum(lane);
}

// to[i] = scale * from[i] with conversion. The last vector may overlap the one before, so `to` and `from` must not.
template <class To, class From>
inline void copy(To* __restrict__ to, const From* __restrict__ from, int64_t n, float scale) {
  if (n < kWidth) return store_some(to, scale * load_some(from, n), n);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, scale * load(from + i));
  if (i < n) store(to + n - kWidth, scale * load(from + n - kWidth));
}

// Calls f(constant<n>) for a number n, 1 <= n <= MOST, that is known at run time only.
template <int N>
struct constant {
  static constexpr int value = N;
};

template <int MOST, class F>
inline void with_constant(int64_t n, F f) {
  if (n == MOST) return f(constant<MOST>{});
  if constexpr (MOST > 1) with_constant<MOST - 1>(n, f);
}

}  // namespace
