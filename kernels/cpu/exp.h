// The exponential function in the vector idiom of vec.h.
#pragma once
#include "vec.h"

namespace {

// e^x for x <= 0, within a relative 1e-7: 0 below -87, near the smallest normal number; a NaN stays one.
// x = n log(2) + r with |r| <= log(2)/2, and e^r by a polynomial whose own error is 3e-9.
inline vec exp(vec x) {
  constexpr float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds to a whole number, 127 is the bias of an exponent
  const vec shifted = x * 1.44269504f + shift;   // n + 127 stands in the low bits
  const vec n = shifted - shift;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, the first exact when multiplied
  vec p = r * 0x1.6a2352p-10f + 0x1.123a6cp-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vec power = (vec)((bits32)shifted << 23);
  return x < -87.0f ? vec{} : p * power;
}

}  // namespace
