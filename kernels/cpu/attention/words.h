// The elements of the matrices in memory: words of 32 bits, one after another in a row. A word is one float or, with
// INSVP_FAST_BF16_PAIRS, two bf16 numbers that are neighbors along the sum of a product. Words has:
//   Number        what a word consists of, and kNumbers, how many
//   mul_add       c + the products of the numbers in the word *a and in each word of b
//   count         the number of words for n numbers along the sum
//   depth         the same, with AMX in whole tiles
//   read_numbers  n numbers of a tensor, as words
//   of_rows       words for a sum over rows: they hold numbers of kNumbers rows, given as floats, instead of columns
//   paired        a matrix x of such words, written to `to`; x itself where words are floats. Where the depth of a
//                 product is a number of tiles, zeros follow
#pragma once
#include "common/amx.h"
#include "common/array.h"
#include "common/bf16_pairs.h"
#include "common/sizes.h"

namespace {

#ifdef INSVP_FAST_AMX
constexpr int64_t kStep = kTile;  // words in a sum come in multiples of it
#else
constexpr int64_t kStep = 1;
#endif

#ifdef INSVP_FAST_BF16_PAIRS

struct Words {
  using Number = bf16;
  static constexpr int kNumbers = 2;

  static vec mul_add(vec c, const float* a, vec b) {
    uint32_t word;
    __builtin_memcpy(&word, a, sizeof word);
    return add_pairs(c, word, (bits32)b);
  }
  static int64_t count(int64_t n) { return (n + 1) / 2; }
  static int64_t depth(int64_t n) { return round_up(count(n), kStep); }
  static void read_numbers(float* to, Array from, int64_t offset, int64_t n) {
    const bf16* numbers = static_cast<const bf16*>(from.data) + offset;
    bf16* words = reinterpret_cast<bf16*>(to);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) __builtin_memcpy(words + i, numbers + i, 64);
    for (; i < n; ++i) words[i] = numbers[i];
  }
  static vec of_rows(const vec (&rows)[2]) { return (vec)joined(rounded(rows[0]), rounded(rows[1])); }
  static const float* paired(float* to, const float* x, int64_t rows, int64_t columns, int64_t stride) {
    const bf16* numbers = reinterpret_cast<const bf16*>(x);
    for (int64_t j = 0; j < rows; j += 2, numbers += 4 * stride)
      for (int64_t i = 0; i < columns; i += kWidth, to += kWidth)
        store(to, (vec)joined(load(numbers + i), j + 1 < rows ? load(numbers + 2 * stride + i) : vec{}));
    const int64_t behind = depth(rows) - count(rows);
    __builtin_memset(to, 0, behind * columns * sizeof(float));
    return to - count(rows) * columns;
  }
};

#else

struct Words {
  using Number = float;
  static constexpr int kNumbers = 1;

  static vec mul_add(vec c, const float* a, vec b) { return c + *a * b; }
  static int64_t count(int64_t n) { return n; }
  static int64_t depth(int64_t n) { return n; }
  static void read_numbers(float* to, Array from, int64_t offset, int64_t n) { read(to, from, offset, n); }
  static vec of_rows(const vec (&rows)[1]) { return rows[0]; }
  static const float* paired(float*, const float* x, int64_t, int64_t, int64_t) { return x; }
};

#endif

}  // namespace
