// GELU in its exact form, x * Phi(x) with Phi the normal distribution function, and its derivative.
#pragma once
#include "vec.h"

namespace {

// 2**y for y <= 0, and 0 where that is close to no longer being a normal number: y = n + f with |f| <= 1/2, 2**f by a
// minimax polynomial (relative error 2e-9), 2**n by its exponent bits.
inline vec exp2_of_negative(vec y) {
  const float magic = 0x1.8p23f;  // pushes the fraction out of the mantissa, and leaves n in its low bits
  const vec shifted = y + magic, f = y - (shifted - magic);
  vec p = f * 1.5353357594e-4f + 1.3398875017e-3f;
  p = p * f + 9.6184369177e-3f;
  p = p * f + 5.5503323674e-2f;
  p = p * f + 2.4022647738e-1f;
  p = p * f + 6.9314718246e-1f;
  p = p * f + 1.0f;
  const vec scaled = (vec)((bits32)p + ((bits32)shifted << 23));
  return y < -125.0f ? vec{} : scaled;
}

struct Normal {
  vec below, density;  // Phi(x), and the density at x without its factor 1 / sqrt(2 pi)
};

// Phi(-t) = exp(-t**2 / 2) * R(t) for t = |x|, with R / s a minimax polynomial in s = 1 / (1 + 0.34 t) (relative error
// 3e-8): nothing cancels in the lower tail, and exp underflows where the tails are 0 and 1.
inline Normal normal(vec x) {
  const vec t = (vec)((bits32)x & 0x7fffffffu), s = 1.0f / (t * 0.34f + 1.0f);
  const vec e = exp2_of_negative(t * t * -0.72134752044f);
  vec r = s * -2.6120660827e-2f + 1.3950031996e-1f;
  r = r * s - 2.7313429117e-1f;
  r = r * s + 2.0218425989e-1f;
  r = r * s - 4.4719416648e-2f;
  r = r * s + 1.1535951495e-1f;
  r = r * s + 1.1519758403e-1f;
  r = r * s + 1.3611221313e-1f;
  r = r * s + 1.3562050462e-1f;
  const vec tail = r * s * e;
  return {x < 0.0f ? tail : 1.0f - tail, e};
}

// The same for results in 16 bits, without a division and with a third of the terms: relative errors of 2e-4, a tenth of
// such a result's rounding. Phi(-t) = 2**p(t).
inline vec rough_exp2_of_negative(vec y) {
  const float magic = 0x1.8p23f;
  const vec shifted = y + magic, f = y - (shifted - magic);
  vec p = f * 5.517131e-2f + 2.4261113e-1f;
  p = p * f + 6.9326103e-1f;
  p = p * f + 9.9992807e-1f;
  const vec scaled = (vec)((bits32)p + ((bits32)shifted << 23));
  return y < -125.0f ? vec{} : scaled;
}

inline Normal rough_normal(vec x) {
  const vec t = (vec)((bits32)x & 0x7fffffffu);
  vec p = t * -3.02386766e-4f + 5.66123795e-3f;
  p = p * t - 4.77063241e-2f;
  p = p * t - 4.6481004e-1f;
  p = p * t - 1.14886574f;
  p = p * t - 1.00014278f;
  const vec tail = rough_exp2_of_negative(p);
  return {x < 0.0f ? tail : 1.0f - tail, rough_exp2_of_negative(t * t * -0.72134752044f)};
}

// The derivative of x * Phi(x).
inline vec slope(vec x, Normal at) { return at.below + x * at.density * 0.39894228040f; }

}  // namespace
