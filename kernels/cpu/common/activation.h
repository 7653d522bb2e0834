// Activations x * P(x) and their derivatives P(x) + x * P'(x), with P a distribution function: in GELU that of the
// standard normal, Phi, in the others sigmoid(a x + b x^3).
#pragma once
#include "common/abi.h"
#include "common/exp.h"

namespace {

using insvp_fast::Activation;

inline vec magnitude(vec x) { return (vec)((bits32)x & 0x7fffffffu); }

// Phi(-t) = bell * ratio for t = |x|, with bell = exp(-t^2 / 2). Nothing cancels in the lower tail, and bell underflows
// where Phi is 0 or 1 in fp32.
struct Tail {
  vec bell, ratio;
};

constexpr float kBell = -0.72134752044f;  // exp(-t^2 / 2) = 2^(kBell * t^2)

// For results in fp32. 2^f has a relative error of 2e-8; ratio / s is a minimax polynomial in s = 1 / (1 + 0.265 t),
// with one of 2e-8.
inline Tail normal_tail(vec x) {
  const vec t = magnitude(x), s = 1.0f / (t * 0.265f + 1.0f);
  const vec bell = exp2_of_negative(t * t * kBell, 1.5353357594e-4f, 1.3398875017e-3f, 9.6184369177e-3f,
                                    5.5503323674e-2f, 2.4022647738e-1f, 6.9314718246e-1f, 1.0f);
  return {bell, s * polynomial(s, 3.066299866e-2f, -1.434826948e-1f, 2.163160606e-1f, -1.146933045e-1f,
                               1.368285889e-1f, 6.0781331e-2f, 1.025835243e-1f, 1.052628703e-1f, 1.057406232e-1f)};
}

// For results in 16 bits, whose rounding is 2e-3: bell * ratio has a relative error of 3e-4 up to t = 1 and 9e-4 up to
// t = 4. Far out, where ratio is subtracted from a multiple of t, its own error is larger.
inline Tail rough_normal_tail(vec x) {
  const vec t = magnitude(x), s = rough_reciprocal(t * 0.335f + 1.0f);
  return {rough_exp2_of_negative(t * t * kBell),
          polynomial(s, 3.733345032e-1f, -6.066433984e-2f, 1.93655814e-1f, -6.337712087e-3f)};
}

// Phi(-t) = 2^p(t): faster, where the density is not needed. The relative error is 3e-4 up to t = 4 and 2e-2 at t = 6,
// where Phi(-t) is 1e-9.
inline vec rough_normal(vec x) {
  return rough_exp2_of_negative(polynomial(magnitude(x), -3.02386766e-4f, 5.66123795e-3f, -4.77063241e-2f,
                                           -4.6481004e-1f, -1.14886574f, -1.00014278f));
}

// A function f with f(-x) = 1 - f(x), from its value at -|x|.
inline vec from_tail(vec x, vec tail) { return x < 0.0f ? tail : 1.0f - tail; }

template <bool ROUGH>
inline vec gelu(vec x) {
  if (ROUGH) return x * from_tail(x, rough_normal(x));
  const Tail tail = normal_tail(x);
  return x * from_tail(x, tail.bell * tail.ratio);
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

struct Sigmoid {
  vec value, slope;  // of sigmoid(a x + b x^3), by x
};

template <bool ROUGH>
inline Sigmoid sigmoid(Cubic c, vec x) {
  vec u = x * c.a, du = vec{} + c.a;
  if (c.b != 0.0f) {  // without it the square of x, which may overflow, does not matter
    u = x * (x * x * c.b + c.a);
    du += x * x * (3.0f * c.b);
  }
  const vec t = magnitude(u), e = ROUGH ? rough_exp2_of_negative(t * -kLog2E) : exp(-t);
  const vec high = ROUGH ? rough_reciprocal(1.0f + e) : 1.0f / (1.0f + e), low = e * high;  // neither tail cancels
  return {u < 0.0f ? low : high, low * high * du};
}

// An activation and its derivative, the slope, for results in 16 bits if ROUGH.
template <bool ROUGH>
inline vec activate(Activation activation, vec x) {
  if (activation == Activation::gelu) return gelu<ROUGH>(x);
  return x * sigmoid<ROUGH>(argument(activation), x).value;
}

struct Activated {
  vec value, slope;
};

template <bool ROUGH>
inline Activated activated(Activation activation, vec x) {
  if (activation == Activation::gelu) {
    const Tail tail = ROUGH ? rough_normal_tail(x) : normal_tail(x);
    constexpr float density = 0.39894228040f;  // 1 / sqrt(2 pi)
    return {x * from_tail(x, tail.bell * tail.ratio),
            from_tail(x, tail.bell * (tail.ratio - magnitude(x) * density))};
  }
  const Sigmoid p = sigmoid<ROUGH>(argument(activation), x);
  return {x * p.value, p.value + x * p.slope};
}

template <bool ROUGH>
inline vec derivative(Activation activation, vec x) {
  return activated<ROUGH>(activation, x).slope;
}

}  // namespace
