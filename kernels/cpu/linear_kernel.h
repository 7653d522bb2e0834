// linear on one block of y, for the vector width of the including file. With INSVP_FAST_BF16_PAIRS a word of x or w holds
// two bf16 factors, else one fp32 factor.
#pragma once
#include "gelu.h"
#include "linear.h"
#include "vec.h"

#ifdef INSVP_FAST_BF16_PAIRS
#include <immintrin.h>
#endif

namespace {

using namespace insvp_fast;

#ifdef INSVP_FAST_BF16_PAIRS
constexpr int kFactors = 2;
typedef bf16 factor;
typedef uint32_t word;
typedef bits32 words;
inline vec multiply_add(vec sum, word x, words w) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)w);
}
#else
constexpr int kFactors = 1;
typedef float factor;
typedef float word;
typedef vec words;
inline vec multiply_add(vec sum, word x, words w) { return sum + x * w; }
#endif

// The sums of a tile, the words of one row of a panel and one word of x fill the 16 registers, or the 32 of AVX-512. A
// tile 4 rows high and 3 vectors wide takes fewer instructions than one of 6 by 2.
constexpr int kRows = kWidth == 16 ? 8 : 4, kVectors = 3, kColumns = kVectors * kWidth;

// sums = [sums +] x @ w. Without the pragmas gcc keeps the sums in memory before and after the loop.
template <int ROWS>
inline void tile(float* sums, const word* x, const word* w, int64_t depth, bool first) {
  vec acc[ROWS][kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[j][v] = vec{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    words wk[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) __builtin_memcpy(&wk[v], w + k * kColumns + v * kWidth, sizeof wk[v]);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[j][v] = multiply_add(acc[j][v], x[j * kRowStride + k], wk[v]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + j * kColumns + v * kWidth;
      store(to, first ? acc[j][v] : load(to) + acc[j][v]);
    }
}

// A tile of any number of rows up to ROWS.
template <int ROWS, class... Arguments>
inline void tile_of(int64_t rows, Arguments... arguments) {
  if (rows == ROWS) return tile<ROWS>(arguments...);
  if constexpr (ROWS > 1) tile_of<ROWS - 1>(rows, arguments...);
}

// The first `n` values, or as many as a vector holds; zeros for the others.
template <class T>
inline vec load_some(const T* from, int64_t n) {
  if (n >= kWidth) return load(from);
  T part[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load(part);
}

template <class T>
inline void store_some(T* to, vec v, int64_t n) {
  if (n >= kWidth) return store(to, v);
  T part[kWidth];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

inline vec read(Array from, int64_t at, int64_t n) {
  if (from.type == DType::f32) return load_some(static_cast<const float*>(from.data) + at, n);
  return load_some(static_cast<const bf16*>(from.data) + at, n);
}

inline void write(Array to, int64_t at, vec v, int64_t n) {
  if (to.type == DType::f32) store_some(static_cast<float*>(to.data) + at, v, n);
  else store_some(static_cast<bf16*>(to.data) + at, v, n);
}

// From the sums of a tile to its results.
inline void finish(const Linear& a, const float* sums, int64_t row, int64_t rows, int64_t column) {
  for (int64_t j = 0; j < rows; ++j)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t n = column + v * kWidth, left = a.N - n, at = (row + j) * a.N + n;
      if (left <= 0) break;
      vec y = load(sums + j * kColumns + v * kWidth);
      if (a.bias) y += load_some(a.bias + n, left);
      if (a.epilogue == Epilogue::gelu) {
        if (a.pre.data) write(a.pre, at, y, left);
        y = gelu(y);
      } else if (a.epilogue == Epilogue::gelu_bwd) {
        y *= gelu_slope(read(a.pre, at, left));
      }
      write(a.y, at, y, left);
    }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// `n` factors of a row to whole words.
inline void take(word* to, const Linear& a, int64_t at, int64_t n) {
  factor* factors = reinterpret_cast<factor*>(to);
#ifdef INSVP_FAST_BF16_PAIRS
  __builtin_memcpy(factors, static_cast<const bf16*>(a.x.data) + at, n * sizeof(bf16));
  if (n % 2) factors[n] = 0;
#else
  if (a.x.type == DType::f32) __builtin_memcpy(factors, static_cast<const float*>(a.x.data) + at, n * sizeof(float));
  else copy(factors, static_cast<const bf16*>(a.x.data) + at, n, 1.0f);
#endif
}

// Announces that the rows of a tile will be read or written.
inline void expect(Array array, int64_t at) {
  const int64_t size = array.type == DType::f32 ? 4 : 2;
  const char* line = static_cast<const char*>(array.data) + at * size;
  for (int64_t i = 0; i < kColumns * size; i += 64) __builtin_prefetch(line + i, 1);
}

void linear_block(const Linear& a, const LinearBlock& b, float* scratch) {
  const int64_t all_words = (a.K + kFactors - 1) / kFactors, run_size = b.rows * kRowStride;
  const int64_t most_words = b.runs * kDepth, end = b.column + b.columns;
  word* x = reinterpret_cast<word*>(scratch);
  for (int64_t part = 0; part == 0 || part < all_words; part += most_words) {
    const int64_t part_end = smaller(all_words, part + most_words);
    for (int64_t j = 0; j < b.rows; ++j) {
      const int64_t m = b.row + j, at = m / a.T * a.batch_stride + m % a.T * a.row_stride;
      word* to = x + j * kRowStride;
      for (int64_t k = part; k < part_end; k += kDepth, to += run_size)
        take(to, a, at + k * kFactors, smaller(kDepth * kFactors, a.K - k * kFactors));
    }

    float* sums = scratch + b.runs * run_size;
    for (int64_t n = b.column; n < end; n += kColumns) {
      const word *w = static_cast<const word*>(a.w) + n * all_words + part * kColumns, *xk = x;
      for (int64_t k = part; k == part || k < part_end; k += kDepth, xk += run_size) {
        const int64_t depth = smaller(kDepth, part_end - k), size = depth * kColumns;
        const word* next = k + depth < part_end ? w + size : w + (part - k + all_words) * kColumns;
        // Of `next`, to be fetched with each row; few rows would send too many requests at a time.
        const int64_t share = b.rows > 4 * kRows ? (size + b.rows - 1) / b.rows : 0;
        const bool last = k + depth == all_words;
        for (int64_t j = 0; j < b.rows; j += kRows) {
          const int64_t rows = smaller(kRows, b.rows - j);
          for (int64_t i = j * share; i < (j + rows) * share; i += 16) __builtin_prefetch(next + i, 0, 2);
          for (int64_t i = j; last && i < j + rows; ++i) {
            expect(a.y, (b.row + i) * a.N + n);
            if (a.pre.data) expect(a.pre, (b.row + i) * a.N + n);
          }
          tile_of<kRows>(rows, sums + j * kColumns, xk + j * kRowStride, w, depth, k == 0);
          if (last) finish(a, sums + j * kColumns, b.row + j, rows, n);
        }
        w += size;
      }
      if (most_words < all_words) sums += b.rows * kColumns;  // each panel's sums wait for the next part
    }
  }
}

}  // namespace
