// Activations x * P(x) and their derivatives P(x) + x * P'(x), with P a distribution function: in GELU that of the
// standard normal, Phi, in the others sigmoid(a x + b x^3).
#pragma once
#include "common/exp.h"
#include "linear.h"

namespace {

using insvp_fast::Activation;

struct Gate {
  vec value, slope;  // P(x) and P'(x)
};

inline vec magnitude(vec x) { return (vec)((bits32)x & 0x7fffffffu); }

inline Gate from_tail(vec x, vec tail, vec density) {
  return {x < 0.0f ? tail : 1.0f - tail, density * 0.39894228040f};  // 1 / sqrt(2 pi)
}

constexpr float kDensity = -0.72134752044f;  // exp(-t^2 / 2) = 2^(kDensity * t^2)

// For results in fp32. 2^f has a relative error of 2e-9. Phi(-t) = exp(-t^2 / 2) * R(t) for t = |x|, with R / s a
// minimax polynomial in s = 1 / (1 + 0.34 t) with a relative error of 3e-8. Nothing cancels in the lower tail, and exp
// underflows where Phi is 0 or 1 in fp32.
inline Gate normal(vec x) {
  const vec t = magnitude(x), s = 1.0f / (t * 0.34f + 1.0f);
  const vec e = exp2_of_negative(t * t * kDensity, 1.5353357594e-4f, 1.3398875017e-3f, 9.6184369177e-3f,
                                 5.5503323674e-2f, 2.4022647738e-1f, 6.9314718246e-1f, 1.0f);
  const vec r = polynomial(s, -2.6120660827e-2f, 1.3950031996e-1f, -2.7313429117e-1f, 2.0218425989e-1f,
                           -4.4719416648e-2f, 1.1535951495e-1f, 1.1519758403e-1f, 1.3611221313e-1f, 1.3562050462e-1f);
  return from_tail(x, r * s * e, e);
}

// For results in 16 bits: no division and a third of the terms. The relative error of 2e-4 is a tenth of the rounding
// of such a result. Phi(-t) = 2^p(t).
inline Gate rough_normal(vec x) {
  const vec t = magnitude(x);
  const vec p = polynomial(t, -3.02386766e-4f, 5.66123795e-3f, -4.77063241e-2f, -4.6481004e-1f, -1.14886574f,
                           -1.00014278f);
  return from_tail(x, rough_exp2_of_negative(p), rough_exp2_of_negative(t * t * kDensity));
}

// `e` is exp(-|u|) for u = a x + b x^3. Neither tail cancels.
inline Gate logistic(vec u, vec e, vec du) {
  const vec high = 1.0f / (1.0f + e), low = e * high;
  return {u < 0.0f ? low : high, low * high * du};
}

struct Cubic {
  float a, b;
};

// 2 sqrt(2 / pi) (x + 0.044715 x^3) is the argument of tanh in gelu_tanh, doubled, as 1 + tanh(t) = 2 sigmoid(2 t).
inline Cubic argument(Activation activation) {
  return activation == Activation::gelu_tanh    ? Cubic{1.59576912f, 0.0713548162f}
         : activation == Activation::quick_gelu ? Cubic{1.702f, 0.0f}
                                                : Cubic{1.0f, 0.0f};
}

// P of an activation, for results in 16 bits if ROUGH.
template <bool ROUGH>
inline Gate gate(Activation activation, vec x) {
  if (activation == Activation::gelu) return ROUGH ? rough_normal(x) : normal(x);
  const Cubic c = argument(activation);
  vec u = x * c.a, du = vec{} + c.a;
  if (c.b != 0.0f) {  // without it the square of x, which may overflow, does not matter
    u = x * (x * x * c.b + c.a);
    du += x * x * (3.0f * c.b);
  }
  const vec t = magnitude(u);
  return logistic(u, ROUGH ? rough_exp2_of_negative(t * -kLog2E) : exp(-t), du);
}

}  // namespace
