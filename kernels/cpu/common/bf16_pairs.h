// Pairs of bf16, and their products where the instruction set has them.
#pragma once
#include "common/vec.h"

namespace {

// Words of two numbers each, given as floats that are rounded to bf16.
inline bits32 joined(vec first, vec second) { return (bits32)first >> 16 | (bits32)second; }

#ifdef INSVP_FAST_BF16_PAIRS
// A word holds two bf16 numbers. To each sum, adds the products of the numbers in a word of `a` with those in one of b.
inline vec add_pairs(vec sums, bits32 a, bits32 b) {
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
inline vec add_pairs(vec sums, uint32_t a, bits32 b) {
  return add_pairs(sums, (bits32)_mm512_set1_epi32(static_cast<int>(a)), b);
}
#endif

}  // namespace
