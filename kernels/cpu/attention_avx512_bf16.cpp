// attention with bf16 operands, whose products are added in pairs.
#define INSVP_FAST_WIDTH 16
#include <immintrin.h>

#include "attention_kernel.h"

namespace {

struct Bf16Pairs {
  static vec mul_add(vec c, const float* a, vec b) {
    int word;
    __builtin_memcpy(&word, a, sizeof word);
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
  }
  static int64_t count(int64_t n) { return (n + 1) / 2; }
  static void read(float* to, Array from, int64_t offset, int64_t n) {
    const bf16* numbers = static_cast<const bf16*>(from.data) + offset;
    bf16* words = reinterpret_cast<bf16*>(to);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) __builtin_memcpy(words + i, numbers + i, 64);
    for (; i < n; ++i) words[i] = numbers[i];
  }
  static const float* narrow(float* to, const float* x, int64_t rows, int64_t stride) {
    for (int64_t i = 0; i < rows * stride; i += kWidth) {
      const __m256bh numbers = _mm512_cvtneps_pbh((__m512)load(x + i));
      __builtin_memcpy(reinterpret_cast<bf16*>(to) + i, &numbers, sizeof numbers);
    }
    return to;
  }
  static const float* paired(float* to, const float* x, int64_t rows, int64_t columns, int64_t stride) {
    const bf16* numbers = reinterpret_cast<const bf16*>(x);
    for (int64_t j = 0; j < rows; j += 2, numbers += 4 * stride)
      for (int64_t i = 0; i < columns; i += kWidth, to += kWidth) {
        const vec second = j + 1 < rows ? load(numbers + 2 * stride + i) : vec{};
        store(to, (vec)((bits32)second | (bits32)load(numbers + i) >> 16));
      }
    return to - count(rows) * columns;
  }
};

}  // namespace

const AttentionKernels insvp_fast::attention_avx512_bf16 = {attention_fwd_head<Bf16Pairs>, attention_bwd_head<Bf16Pairs>};
