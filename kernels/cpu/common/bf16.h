// Conversion between fp32 and bf16.
#pragma once
#include <cstdint>

namespace {

typedef uint16_t bf16;

// The bf16 nearest to x, ties to even, given x and its bits; for one number or a vector of them. A NaN becomes the
// default NaN, because rounding could carry its mantissa into infinity.
template <class Float, class Bits>
inline Bits rounded_to_bf16(Float x, Bits bits) {
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = rounded * 0u + 0x7fc0u;
  return x == x ? rounded : nan;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

inline void narrow(float& to, float x) { to = x; }
inline void narrow(bf16& to, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  to = static_cast<bf16>(rounded_to_bf16(x, bits));
}

}  // namespace
