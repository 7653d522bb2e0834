// Products of pairs of bf16, where the instruction set has them.
#pragma once
#ifdef INSVP_FAST_BF16_PAIRS
#include <immintrin.h>

#include "common/vec.h"

namespace {

// A word holds two bf16 numbers. To each sum, adds the products of the numbers in `a` with those in a word of b.
inline vec add_pairs(vec sums, uint32_t a, bits32 b) {
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}

}  // namespace
#endif
