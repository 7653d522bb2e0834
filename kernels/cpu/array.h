// Reading and writing arrays whose dtype is known at run time.
#pragma once
#include "common.h"
#include "vec.h"

namespace {

using namespace insvp_fast;

// to[0..n) = scale * from[offset..offset+n)
inline void read(float* to, Array from, int64_t offset, int64_t n, float scale) {
  if (from.type == DType::f32) copy(to, static_cast<const float*>(from.data) + offset, n, scale);
  else copy(to, static_cast<const bf16*>(from.data) + offset, n, scale);
}

// to[offset..offset+n) = scale * from[0..n)
inline void write(Array to, int64_t offset, const float* from, int64_t n, float scale) {
  if (to.type == DType::f32) copy(static_cast<float*>(to.data) + offset, from, n, scale);
  else copy(static_cast<bf16*>(to.data) + offset, from, n, scale);
}

}  // namespace
