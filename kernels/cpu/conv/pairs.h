// The factors of the convolutions in vectors: fp32 or, where they may be rounded, pairs of bf16.
#pragma once
#include "common/bf16_pairs.h"
#include "input.h"

namespace {

#if defined INSVP_FAST_AMX
constexpr Rounded kRounded = Rounded::tiles;
#elif defined INSVP_FAST_BF16_PAIRS
constexpr Rounded kRounded = Rounded::pairs;
#else
constexpr Rounded kRounded = Rounded::none;
#endif

// A vector of words: of numbers in fp32, or of pairs in bf16.
inline vec load_words(const float* p) { return load(p); }
inline bits32 load_words(const bf16* p) {
  bits32 words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}
template <class Number>
using Words = decltype(load_words(static_cast<const Number*>(nullptr)));

inline vec mul_add(vec sums, float a, vec b) { return sums + a * b; }
inline vec mul_add(vec sums, vec a, vec b) { return sums + a * b; }
#ifdef INSVP_FAST_BF16_PAIRS
inline vec mul_add(vec sums, uint32_t a, vec b) { return add_pairs(sums, a, (bits32)b); }
inline vec mul_add(vec sums, bits32 a, bits32 b) { return add_pairs(sums, a, b); }
#endif

// Whether the first n numbers of each of `count` planes are finite when they are rounded to bf16.
inline bool finite_when_rounded(const float* planes, int64_t count, int64_t plane, int64_t n) {
  vec odd = {};
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < n; i += kWidth) odd += 0.0f * rounded(load_some(planes + k * plane + i, n - i));
  return sum(odd) == 0;
}

// Rounds the first n numbers of each of `count` planes, in whole vectors, to planes that are half as far apart, in the
// same memory: each store ends in front of what is still to be read.
inline const bf16* narrow_in_place(float* planes, int64_t count, int64_t plane, int64_t n) {
  bf16* to = reinterpret_cast<bf16*>(planes);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < n; i += kWidth) store(to + k * plane + i, load(planes + k * plane + i));
  return to;
}

// Makes words of every second channel and the next one, in its place. Returns false, with nothing changed, where a
// number is not finite when it is rounded.
inline bool pair_channels(float* x, const ConvShape& s, const ConvLayout& l, int64_t rows) {
  const int64_t planes = s.pool * s.pool * s.C, n = rows * l.stride + kSlack;
  if (!finite_when_rounded(x, planes, l.plane, n)) return false;
  for (int64_t phase = 0; phase < planes; phase += s.C)
    for (int64_t c = 0; c < s.C; c += 2) {
      float* to = x + (phase + c) * l.plane;
      for (int64_t i = 0; i < n; i += kWidth)
        store(to + i, (vec)joined(rounded(load(to + i)), c + 1 < s.C ? rounded(load(to + l.plane + i)) : vec{}));
    }
  return true;
}

}  // namespace
