// The softmax of the rows of a matrix, and its gradient.
#pragma once
#include <utility>

#include "common/array.h"
#include "common/exp.h"
#include "common/sizes.h"

namespace {

// The elements of v whose places differ from those of others in one bit of their numbers change places with them.
template <int BIT, int... PLACES>
inline vec exchanged(vec v, std::integer_sequence<int, PLACES...>) {
  return __builtin_shufflevector(v, v, (PLACES ^ BIT)...);
}

// The sum or maximum of all elements, in every element.
template <class Operation, int BIT = kWidth / 2>
inline vec reduce(vec v, Operation operation) {
  v = operation(v, exchanged<BIT>(v, std::make_integer_sequence<int, kWidth>()));
  if constexpr (BIT > 1) return reduce<Operation, BIT / 2>(v, operation);
  return v;
}

inline vec maximum(vec a, vec b) { return a > b ? a : b; }
inline vec add(vec a, vec b) { return a + b; }

#ifdef INSVP_FAST_BF16_PAIRS
inline vec exp_of_score(vec x) { return rough_exp2_of_negative(x * kLog2E); }  // probabilities become bf16
#else
inline vec exp_of_score(vec x) { return exp(x); }
#endif

// A vector of scores from column i on; -inf behind the row's `count` columns.
inline vec scores_from(const float* x, int64_t i, int64_t count) {
  const vec v = load(x + i);
  if (i + kWidth <= count) return v;
  return is_one_of_the_first(count - i) ? v : vec{} - __builtin_inff();
}

// What is added to the scores: rows of `columns` numbers, or null.
struct Summands {
  const float *bias, *mask;
  int64_t columns;

  vec from(int64_t row, int64_t i) const {
    vec v = {};
    if (i >= columns) return v;
    if (bias) v += load_some(bias + row * columns + i, columns - i);
    if (mask) v += load_some(mask + row * columns + i, columns - i);
    return v;
  }
};

// The softmax of each row, in place, with `count` columns in VECTORS vectors, which stay in registers. What follows the
// columns up to a whole vector becomes zero.
template <int VECTORS>
inline void softmax_of_short_rows(float* x, int64_t rows, int64_t count, int64_t stride, Summands summands) {
  for (int64_t j = 0; j < rows; ++j, x += stride) {
    vec row[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) row[i] = scores_from(x, i * kWidth, count) + summands.from(j, i * kWidth);
    vec most = row[0], total = {};
#pragma GCC unroll 4
    for (int i = 1; i < VECTORS; ++i) most = maximum(row[i], most);
    most = reduce(most, maximum);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) total += row[i] = exp_of_score(row[i] - most);
    const vec factor = 1.0f / reduce(total, add);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) store(x + i * kWidth, factor * row[i]);
  }
}

// The same for rows of any length.
inline void softmax(float* x, int64_t rows, int64_t count, int64_t stride, Summands summands) {
  const int64_t end = round_up(count, kWidth);
  if (end <= 4 * kWidth)
    return with_constant<4>(end / kWidth, [&](auto vectors) {
      softmax_of_short_rows<vectors.value>(x, rows, count, stride, summands);
    });
  for (int64_t j = 0; j < rows; ++j, x += stride) {
    vec most = vec{} - __builtin_inff(), total = {};
    for (int64_t i = 0; i < end; i += kWidth) {
      const vec v = scores_from(x, i, count) + summands.from(j, i);
      most = maximum(v, most);
      store(x + i, v);
    }
    most = reduce(most, maximum);
    for (int64_t i = 0; i < end; i += kWidth) {
      const vec e = exp_of_score(load(x + i) - most);
      total += e;
      store(x + i, e);
    }
    const vec factor = 1.0f / reduce(total, add);
    for (int64_t i = 0; i < end; i += kWidth) store(x + i, factor * load(x + i));
  }
}

// Turns the gradient of the probabilities p into that of the scores, in place.
inline void softmax_bwd(float* dp, const float* p, int64_t rows, int64_t count, int64_t stride) {
  for (int64_t j = 0; j < rows; ++j, p += stride, dp += stride) {
    vec products = {};
    for (int64_t i = 0; i < count; i += kWidth) products += load(p + i) * load(dp + i);
    const vec delta = reduce(products, add);
    for (int64_t i = 0; i < count; i += kWidth) store(dp + i, load(p + i) * (load(dp + i) - delta));
  }
}

}  // namespace
