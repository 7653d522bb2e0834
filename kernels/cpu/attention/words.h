// The elements of the matrices in memory: words of 32 bits, one after another in a row. A word is one float or, with
// INSVP_FAST_BF16_PAIRS, two bf16 numbers that are neighbors along the sum of a product. Words has:
//   mul_add       c + the products of the numbers in the word *a and in each word of b
//   count         the number of words for n numbers along the sum
//   read_numbers  n numbers of a tensor, as words
//   narrow        rows of floats as words, written to `to`; x itself where words are floats
//   paired        the matrix x for a sum over its rows: a word holds numbers of two rows instead of two columns.
//                 Written to `to`; x itself where words are floats
#pragma once
#include "common/array.h"
#include "common/bf16_pairs.h"

namespace {

#ifdef INSVP_FAST_BF16_PAIRS

struct Words {
  static vec mul_add(vec c, const float* a, vec b) {
    uint32_t word;
    __builtin_memcpy(&word, a, sizeof word);
    return add_pairs(c, word, (bits32)b);
  }
  static int64_t count(int64_t n) { return (n + 1) / 2; }
  static void read_numbers(float* to, Array from, int64_t offset, int64_t n) {
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

#else

struct Words {
  static vec mul_add(vec c, const float* a, vec b) { return c + *a * b; }
  static int64_t count(int64_t n) { return n; }
  static void read_numbers(float* to, Array from, int64_t offset, int64_t n) { read(to, from, offset, n); }
  static const float* narrow(float*, const float* x, int64_t, int64_t) { return x; }
  static const float* paired(float*, const float* x, int64_t, int64_t, int64_t) { return x; }
};

#endif

}  // namespace
