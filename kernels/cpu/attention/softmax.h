// The softmax of the rows of a matrix, and its gradient.
#pragma once
#include "common/array.h"
#include "common/exp.h"
#include "common/sizes.h"
#include "transpose.h"
#include "words.h"

namespace {

inline vec maximum(vec a, vec b) { return a > b ? a : b; }
inline vec add(vec a, vec b) { return a + b; }

// The sum or maximum of the elements of each of the first `count` vectors.
template <class Operation>
inline vec reduce(vec (&v)[kWidth], int64_t count, Operation operation) {
  for (int64_t i = count; i < kWidth; ++i) v[i] = vec{};
#pragma GCC unroll 4
  for (int n = kWidth / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = operation(zip<0>(v[i], v[i + n]), zip<1>(v[i], v[i + n]));
  return v[0];
}

#ifdef INSVP_FAST_BF16_PAIRS
// e^(factor * x): roughly, as probabilities become bf16.
inline vec exp_of(vec x, float factor) { return rough_exp2_of_negative(x * (factor * kLog2E)); }
#else
inline vec exp_of(vec x, float factor) { return exp(x * factor); }
#endif

// The scores of a row: products of queries and keys, scaled, plus summands of `columns` numbers, or null.
struct Scores {
  float scale;
  const float *bias, *mask;
  int64_t columns;

  // Whether the largest product gives the largest score: then products serve as scores, whose unit is `unit`.
  bool ordered() const { return !bias && !mask && scale > 0.0f; }
  float unit() const { return ordered() ? scale : 1.0f; }

  // A vector of them from column i on, given the products.
  vec from(vec products, int64_t row, int64_t i) const {
    vec v = scale * products;
    const int64_t at = row * columns + i;
    if (i + kWidth <= columns) {
      if (bias) v += load(bias + at);
      if (mask) v += load(mask + at);
    } else if (i < columns) {
      if (bias) v += load_some(bias + at, columns - i);
      if (mask) v += load_some(mask + at, columns - i);
    }
    return v;
  }
};

// Writes zeros behind the columns of a row that a product will take in whole tiles.
template <class Number>
inline void end_row(Number* row, int64_t count) {
  const int64_t end = Words::kNumbers * Words::depth(count);
  for (int64_t i = round_up(count, kWidth); i < end; i += kWidth) store(row + i, vec{});
}

// A block of up to kWidth rows, whose largest scores and sums are found together: a row alone would wait for each.
struct Block {
  float* x;
  int64_t rows, count, stride;

  static vec lowest() { return vec{} - __builtin_inff(); }

  // result = f(result, vector, its first column) for the vectors of a row; the last one ends with -inf.
  template <class F>
  vec for_each_vector(vec result, const float* row, F f) const {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) result = f(result, load(row + i), i);
    if (i < count) result = f(result, is_one_of_the_first(count - i) ? load(row + i) : lowest(), i);
    return result;
  }

  // Turns products into scores, unless they serve as such; returns the largest of each row.
  vec largest(int64_t first, const Scores& scores) const {
    vec most[kWidth];
    const bool ordered = scores.ordered();
    for (int64_t j = 0; j < rows; ++j) {
      float* row = x + j * stride;
      vec m = lowest();
      if (ordered) {
        m = for_each_vector(m, row, [](vec m, vec v, int64_t) { return maximum(v, m); });
      } else {
        for (int64_t i = 0; i < count; i += kWidth) store(row + i, scores.from(load(row + i), first + j, i));
        m = for_each_vector(m, row, [](vec m, vec v, int64_t) { return maximum(v, m); });
      }
      most[j] = m;
    }
    return reduce(most, rows, maximum);
  }

  // Given scores, writes e^(unit * (score - largest score)), with zeros behind the columns up to a whole vector;
  // returns 1 / the sum of each row. `to` has the rows and the stride of x, and may be x.
  template <class Number>
  vec exponentials(Number* to, const float* most, float unit) const {
    vec total[kWidth];
    for (int64_t j = 0; j < rows; ++j) {
      Number* row = to + j * stride;
      total[j] = for_each_vector(vec{}, x + j * stride, [&](vec t, vec v, int64_t i) {
        const vec e = exp_of(v - most[j], unit);
        store(row + i, e);
        return t + e;
      });
      end_row(row, count);
    }
    return 1.0f / reduce(total, rows, add);
  }

  // The sums of the products of factor * x, which are the probabilities, with y.
  vec products(const float* factor, const float* y) const {
    vec total[kWidth];
    for (int64_t j = 0; j < rows; ++j) {
      vec t = {};
      for (int64_t i = 0; i < count; i += kWidth) t += factor[j] * load(x + j * stride + i) * load(y + j * stride + i);
      total[j] = t;
    }
    return reduce(total, rows, add);
  }
};

// The probabilities of `rows` rows of products x are factor * to, the latter as words. `to` may be x where words are
// floats. `factor` is written up to a multiple of kWidth.
inline void softmax(float* to, float* factor, float* x, int64_t rows, int64_t count, int64_t stride,
                    const Scores& scores) {
  for (int64_t first = 0; first < rows; first += kWidth) {
    const Block block{x + first * stride, smaller(kWidth, rows - first), count, stride};
    float most[kWidth];
    store(most, block.largest(first, scores));
    Words::Number* numbers = reinterpret_cast<Words::Number*>(to) + first * stride;
    store(factor + first, block.exponentials(numbers, most, scores.unit()));
  }
}

// Turns products x into probabilities and their gradient dp into that of the products, as words for sums over rows.
// `d_words` gets the gradient as words for sums over columns too; where words are floats, dp holds them already.
inline void softmax_bwd(float* dp, float* x, [[maybe_unused]] float* d_words, int64_t rows, int64_t count,
                        int64_t stride, const Scores& scores) {
  constexpr int n = Words::kNumbers;
  float *p_to = x, *d_to = dp;
  for (int64_t first = 0; first < rows; first += kWidth, x += kWidth * stride, dp += kWidth * stride) {
    const Block block{x, smaller(kWidth, rows - first), count, stride};
    float most[kWidth], factor[kWidth], delta[kWidth];
    store(most, block.largest(first, scores));
    store(factor, block.exponentials(x, most, scores.unit()));
    store(delta, block.products(factor, dp));
    for (int64_t j = 0; j < block.rows; j += n, p_to += stride, d_to += stride)
      for (int64_t i = 0; i < count; i += kWidth) {
        vec p[n] = {}, d[n] = {};
#pragma GCC unroll 2
        for (int r = 0; r < n; ++r)
          if (j + r < block.rows) {
            const int64_t at = (j + r) * stride + i;
            p[r] = factor[j + r] * load(x + at);
            d[r] = scores.scale * p[r] * (load(dp + at) - delta[j + r]);
            if constexpr (n > 1) store(reinterpret_cast<Words::Number*>(d_words) + first * stride + at, d[r]);
          }
        store(p_to + i, Words::of_rows(p));  // where numbers that have been read were
        store(d_to + i, Words::of_rows(d));
      }
    if constexpr (n > 1)
      for (int64_t j = first; j < first + block.rows; ++j)
        end_row(reinterpret_cast<Words::Number*>(d_words) + j * stride, count);
  }
}

}  // namespace
