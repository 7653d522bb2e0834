// The arithmetic of linear on one block of y. With INSVP_FAST_BF16_PAIRS a word of x or w holds two bf16 factors,
// otherwise one fp32 factor.
#include "activation.h"
#include "common/array.h"
#include "common/bf16_pairs.h"
#include "common/sizes.h"
#include "linear.h"

namespace {

using namespace insvp_fast;

#ifdef INSVP_FAST_BF16_PAIRS
constexpr int kFactors = 2;
typedef bf16 factor;
typedef uint32_t word;
typedef bits32 words;
constexpr bool kRough = true;
inline vec multiply_add(vec sum, word x, words w) { return add_pairs(sum, x, w); }
#else
constexpr int kFactors = 1;
typedef float factor;
typedef float word;
typedef vec words;
constexpr bool kRough = false;
inline vec multiply_add(vec sum, word x, words w) { return sum + x * w; }
#endif

// The sums of a tile, the words of one row of a panel and one word of x fill the 16 registers, or the 32 of AVX-512.
// With 16, a tile of 4 rows and 3 vectors takes fewer instructions than one of 6 by 2.
constexpr int kRows = kWidth == 16 ? 8 : 4, kVectors = 3, kColumns = kVectors * kWidth;

// Where the rows of x that the next tile will need begin, and how many bytes of x become a cache line of words.
struct Soon {
  const char* rows[kRows];
  int64_t line;
};

// sums = [sums +] x @ w. Without the pragmas gcc keeps the sums in memory before and after the loop. The run of words
// in `soon` is prefetched line by line on the way: many requests at a time would hold up the product.
template <int ROWS, int VECTORS>
inline void tile(float* sums, const word* x, const word* w, int64_t depth, bool first, const Soon* soon) {
  vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[j][v] = vec{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    if (soon) __builtin_prefetch(soon->rows[k * kRows / kLine % kRows] + k / kLine * soon->line);
    words wk[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(&wk[v], w + k * kColumns + v * kWidth, sizeof wk[v]);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[j][v] = multiply_add(acc[j][v], x[j * kRowStride + k], wk[v]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* to = sums + j * kColumns + v * kWidth;
      store(to, first ? acc[j][v] : load(to) + acc[j][v]);
    }
}

// A row of a tile.
struct Row {
  vec at[kVectors];
};

// The first `columns` elements of a row. Without the pragmas gcc keeps rows in memory.
template <class T>
inline Row read_row(const T* from, int64_t columns) {
  Row row;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
    row.at[v] = columns >= kColumns ? load(from + v * kWidth) : load_some(from + v * kWidth, columns - v * kWidth);
  return row;
}

inline Row read_row(Array from, int64_t at, int64_t columns) {
  if (from.type == DType::f32) return read_row(static_cast<const float*>(from.data) + at, columns);
  return read_row(static_cast<const bf16*>(from.data) + at, columns);
}

template <class T>
inline void write_row(T* to, const Row& row, int64_t columns) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
    if (columns >= kColumns) store(to + v * kWidth, row.at[v]);
    else store_some(to + v * kWidth, row.at[v], columns - v * kWidth);
}

inline void write_row(Array to, int64_t at, const Row& row, int64_t columns) {
  if (to.type == DType::f32) write_row(static_cast<float*>(to.data) + at, row, columns);
  else write_row(static_cast<bf16*>(to.data) + at, row, columns);
}

// Makes the results of a tile, WHOLE or at the edge of y, from its sums.
template <Epilogue EPILOGUE, Activation ACTIVATION, bool WHOLE>
__attribute__((noinline)) void finish_rows(
    const Linear& a, const float* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = WHOLE ? kColumns : a.N - column;
  const Row bias = a.bias ? read_row(a.bias + column, columns) : Row{};
  for (int64_t m = row; m < row + rows; ++m, sums += kColumns) {
    const int64_t at = m * a.N + column;
    Row y;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) y.at[v] = load(sums + v * kWidth) + bias.at[v];
    if constexpr (EPILOGUE == Epilogue::activate) {
      if (a.pre.data) write_row(a.pre, at, y, columns);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) y.at[v] = activate<kRough>(ACTIVATION, y.at[v]);
    } else if constexpr (EPILOGUE == Epilogue::activate_bwd) {
      const Row pre = read_row(a.pre, at, columns);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) y.at[v] *= derivative<kRough>(ACTIVATION, pre.at[v]);
    }
    write_row(a.y, at, y, columns);
  }
}

template <Epilogue EPILOGUE, Activation ACTIVATION>
inline void finish_tile(const Linear& a, const float* sums, int64_t row, int64_t rows, int64_t column) {
  if (a.N - column >= kColumns) finish_rows<EPILOGUE, ACTIVATION, true>(a, sums, row, rows, column);
  else finish_rows<EPILOGUE, ACTIVATION, false>(a, sums, row, rows, column);
}

template <Epilogue EPILOGUE, class... Tile>
inline void finish_activation(const Linear& a, Tile... tile) {
  if (a.activation == Activation::gelu) finish_tile<EPILOGUE, Activation::gelu>(a, tile...);
  else if (a.activation == Activation::gelu_tanh) finish_tile<EPILOGUE, Activation::gelu_tanh>(a, tile...);
  else if (a.activation == Activation::quick_gelu) finish_tile<EPILOGUE, Activation::quick_gelu>(a, tile...);
  else finish_tile<EPILOGUE, Activation::silu>(a, tile...);
}

inline void finish(const Linear& a, const float* sums, int64_t row, int64_t rows, int64_t column) {
  constexpr Activation unused = Activation::gelu;
  if (a.epilogue == Epilogue::none) finish_tile<Epilogue::none, unused>(a, sums, row, rows, column);
  else if (a.epilogue == Epilogue::activate) finish_activation<Epilogue::activate>(a, sums, row, rows, column);
  else finish_activation<Epilogue::activate_bwd>(a, sums, row, rows, column);
}

// Rows of x, at word k of which a run begins.
struct Run {
  int64_t row, rows, k, depth;
};

// Calls f(j, offset of the first factor) for each row.
template <class F>
inline void for_each_row(const Linear& a, const Run& r, F f) {
  int64_t image = r.row / a.T, token = r.row % a.T;
  for (int64_t j = 0; j < r.rows; ++j) {
    f(j, image * a.batch_stride + token * a.row_stride + r.k * kFactors);
    if (++token == a.T) token = 0, ++image;
  }
}

// Copies a run of words of x.
inline void take(word* x, const Linear& a, const Run& r) {
  const int64_t n = smaller(r.depth * kFactors, a.K - r.k * kFactors);
  for_each_row(a, r, [&](int64_t j, int64_t at) {
    factor* to = reinterpret_cast<factor*>(x + j * kRowStride);
#ifdef INSVP_FAST_BF16_PAIRS
    __builtin_memcpy(to, static_cast<const bf16*>(a.x.data) + at, n * sizeof(bf16));
    if (n % 2) __builtin_memset(to + n, 0, sizeof(bf16));
#else
    if (a.x.type == DType::f32) __builtin_memcpy(to, static_cast<const float*>(a.x.data) + at, n * sizeof(float));
    else copy(to, static_cast<const bf16*>(a.x.data) + at, n, 1.0f);
#endif
  });
}

inline Soon soon(const Linear& a, const Run& r) {
  const int64_t size = size_of(a.x.type);
  Soon s = {{}, kLine * kFactors * size};
  for_each_row(a, r, [&](int64_t j, int64_t at) { s.rows[j] = static_cast<const char*>(a.x.data) + at * size; });
  for (int64_t j = r.rows; j < kRows; ++j) s.rows[j] = s.rows[0];
  return s;
}

// Prefetches a row of a tile that will be read or written.
inline void expect(Array array, int64_t at) {
  const int64_t size = size_of(array.type);
  const char* line = static_cast<const char*>(array.data) + at * size;
  for (int64_t i = 0; i < kColumns * size; i += 64) __builtin_prefetch(line + i, 1);
}

// The sums of one panel over one run of words and, with the last run, the results. `next` is the run of w used after
// this one. The first panel copies its rows of x, each tile those that were prefetched with the tile before.
inline void panel_run(const Linear& a, const LinearBlock& b, int64_t column, float* sums, word* x, int64_t k,
                      const word* w, const word* next, int64_t depth, bool first, bool last) {
  const int64_t vectors = smaller(kVectors, ceil_div(a.N - column, kWidth));
  int64_t share = ceil_div(depth * kColumns, b.rows);  // of `next`, to be prefetched with each row
  if (share * kRows > 96 * 16) share = 0;              // so many requests at a time would delay each other
  for (int64_t j = 0; j < b.rows; j += kRows) {
    const int64_t rows = smaller(kRows, b.rows - j);
    Soon next_rows;
    const Soon* expected = nullptr;
    if (column == b.column) {
      take(x + j * kRowStride, a, {b.row + j, rows, k, depth});
      const int64_t left = b.rows - j - rows;
      if (left > 0) next_rows = soon(a, {b.row + j + rows, smaller(kRows, left), k, depth});
      else if (!last) next_rows = soon(a, {b.row, smaller(kRows, b.rows), k + depth, depth});
      if (left > 0 || !last) expected = &next_rows;
    }
    for (int64_t i = j * share; i < (j + rows) * share; i += 16) __builtin_prefetch(next + i, 0, 2);
    for (int64_t m = b.row + j; last && m < b.row + j + rows; ++m) {
      expect(a.y, m * a.N + column);
      if (a.pre.data) expect(a.pre, m * a.N + column);
    }
    with_constant<kRows>(rows, [&](auto height) {
      with_constant<kVectors>(vectors, [&](auto width) {
        tile<height.value, width.value>(sums + j * kColumns, x + j * kRowStride, w, depth, first, expected);
      });
    });
    if (last) finish(a, sums + j * kColumns, b.row + j, rows, column);
  }
}

void linear_block(const Linear& a, const LinearBlock& b, float* scratch) {
  const int64_t K = ceil_div(a.K, kFactors), part = b.runs * kDepth;  // in words
  word* x = reinterpret_cast<word*>(scratch);
  for (int64_t first = 0; first == 0 || first < K; first += part) {
    const int64_t end = smaller(K, first + part);
    float* sums = scratch + part / kDepth * b.rows * kRowStride;
    for (int64_t n = b.column; n < b.column + b.columns; n += kColumns) {
      const word* w = static_cast<const word*>(a.w) + n * K;
      for (int64_t k = first; k == first || k < end; k += kDepth) {
        const int64_t depth = smaller(kDepth, end - k), following = k + depth < end ? k + depth : K + first;
        panel_run(a, b, n, sums, x + (k - first) / kDepth * b.rows * kRowStride, k, w + k * kColumns,
                  w + following * kColumns, depth, k == 0, k + depth == K);
      }
      if (part < K) sums += b.rows * kColumns;  // the sums of each panel wait for the next part
    }
  }
}

}  // namespace

template <>
const LinearKernels& insvp_fast::kernels_for<LinearKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr LinearKernels kernels{kRows, kColumns, kFactors, linear_block};
  return kernels;
}
