// Reading and writing arrays whose dtype is known at run time only.
#pragma once
#include "common/abi.h"
#include "common/vec.h"

namespace {

using namespace insvp_fast;

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
