// Exponential functions of vectors.
#pragma once
#include "common/vec.h"

namespace {

// Horner's rule: ((first * x + second) * x + ...) + last.
inline vec horner(vec, vec p) { return p; }
template <class... Rest>
inline vec horner(vec x, vec p, float next, Rest... rest) {
  return horner(x, p * x + next, rest...);
}
template <class... Rest>
inline vec polynomial(vec x, float first, float second, Rest... rest) {
  return horner(x, x * first + second, rest...);
}

// Adding 1.5 * 2^23 rounds a float to a whole number, which then stands in the low bits.
constexpr float kRound = 12582912.0f;

// e^x for x <= 0, with a relative error below 1e-7. Below -87, near the smallest normal number, it is 0; NaN stays NaN.
// x = n log(2) + r with |r| <= log(2)/2; e^r is a polynomial with an error of 3e-9.
inline vec exp(vec x) {
  constexpr float shift = kRound + 127.0f;      // 127: the bias of an exponent
  const vec shifted = x * 1.44269504f + shift;  // n + 127 stands in the low bits
  const vec n = shifted - shift;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts; n times the first is exact
  const vec p = polynomial(r, 0x1.6a2352p-10f, 0x1.123a6cp-7f, 0x1.5558f4p-5f, 0x1.55549p-3f, 0x1.fffffcp-2f, 1.0f,
                           1.0f);
  const vec power = (vec)((bits32)shifted << 23);
  return x < -87.0f ? vec{} : p * power;
}

#ifdef __AVX512DQ__
// p * 2^n, with n rounded down; 0 where y is below -125.
inline vec scaled(vec p, vec n, vec y) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)y, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  return (vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
}
#endif

// 2^y for y <= 0; 0 below -125, where it ceases to be a normal number. With AVX-512 NaN stays NaN, else it may become
// any number. y = n + f with a whole number n; `coefficients` are those of the polynomial that replaces 2^f,
// |f| <= 1/2.
template <class... Coefficients>
inline vec exp2_of_negative(vec y, Coefficients... coefficients) {
#ifdef __AVX512DQ__
  const vec f = (vec)_mm512_maskz_reduce_ps(0xffff, (__m512)y, 0);  // gcc would warn of the form without a mask
  return scaled(polynomial(f, coefficients...), y - f, y);
#else
  const vec shifted = y + kRound, f = y - (shifted - kRound);
  const vec p = polynomial(f, coefficients...);
  const vec power = (vec)((bits32)p + ((bits32)shifted << 23));  // n is added to the exponent of p
  return y < -125.0f ? vec{} : power;
#endif
}

// The same with a relative error of 1e-4, for results in 16 bits. Only kernels with AVX-512 call it.
inline vec rough_exp2_of_negative(vec y) {
#ifdef __AVX512DQ__
  const vec f = (vec)_mm512_maskz_reduce_ps(0xffff, (__m512)y, 1);  // 0 <= f < 1: scaling rounds down by itself
  return scaled(polynomial(f, 0.078024523f, 0.22606716f, 0.69583354f, 0.99992522f), y, y);
#else
  return exp(y * 0.693147181f);
#endif
}

constexpr float kLog2E = 1.44269504f;

}  // namespace
