// Reading and writing arrays whose dtype is known at run time only.
#pragma once
#include "common/abi.h"
#include "common/vec.h"

namespace {

using namespace insvp_fast;

// The first n values, or a whole vector if n is larger; zeros in the other elements.
template <class T>
inline vec load_some(const T* from, int64_t n) {
  if (n >= kWidth) return load(from);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == sizeof(float)) {
    const __mmask16 first = n > 0 ? (1u << n) - 1 : 0;
    return (vec)_mm512_maskz_loadu_ps(first, from);
  }
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
  T part[kWidth];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

inline vec read(Array from, int64_t at, int64_t n) {
  if (from.type == DType::f32) return load_some(static_cast<const float*>(from.data) + at, n);
  return load_some(static_cast<const bf16*>(from.data) + at, n);
}

inline void write(Array to, int64_t at, vec v, int64_t n) {
  if (to.type == DType::f32) store_some(static_cast<float*>(to.data) + at, v, n);
  else store_some(static_cast<bf16*>(to.data) + at, v, n);
}

// to[0..n) = scale * from[offset..offset+n)
inline void read(float* __restrict__ to, Array from, int64_t offset, int64_t n, float scale = 1.0f) {
  if (from.type == DType::f32) copy(to, static_cast<const float*>(from.data) + offset, n, scale);
  else copy(to, static_cast<const bf16*>(from.data) + offset, n, scale);
}

// to[offset..offset+n) = scale * from[0..n)
inline void write(Array to, int64_t offset, const float* __restrict__ from, int64_t n, float scale = 1.0f) {
  if (to.type == DType::f32) copy(static_cast<float*>(to.data) + offset, from, n, scale);
  else copy(static_cast<bf16*>(to.data) + offset, from, n, scale);
}

}  // namespace
