// From sums to results: bias, epilogue and dtype.
#pragma once
#include "common/activation.h"
#include "common/array.h"
#include "linear.h"
#include "tile.h"

namespace {

using namespace insvp_fast;

constexpr bool kRough = kFactors == 2;  // results in 16 bits allow for it

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

// Writes a row of a WHOLE panel in bf16. With matrix tiles it is a cache line, which is then not read before.
inline void write_past_caches(Array to, int64_t at, const Row& row) {
#ifdef INSVP_FAST_AMX
  static_assert(kColumns * sizeof(bf16) == 64);
  const __m512bh line = _mm512_cvtne2ps_pbh((__m512)row.at[1], (__m512)row.at[0]);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<bf16*>(to.data) + at), (__m512i)line);
#else
  write_row(to, at, row, kColumns);
#endif
}

// Makes rows of results, of a WHOLE panel or of one at the edge of y, from their sums.
template <Epilogue EPILOGUE, Activation ACTIVATION, bool WHOLE>
void finish_rows(const Linear& a, const float* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = WHOLE ? kColumns : a.N - column;
  const Row bias = a.bias ? read_row(a.bias + column, columns) : Row{};
  for (int64_t m = row; m < row + rows; ++m, sums += kColumns) {
    const int64_t at = m * a.N + column;
    Row y;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) y.at[v] = load(sums + v * kWidth) + bias.at[v];
    if constexpr (EPILOGUE == Epilogue::activate) {
      if (WHOLE && a.pre_past_caches) write_past_caches(a.pre, at, y);
      else if (a.pre.data) write_row(a.pre, at, y, columns);
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

// Prefetches a row of a tile that will be read or written.
inline void expect(Array array, int64_t at) {
  const int64_t size = size_of(array.type);
  const char* line = static_cast<const char*>(array.data) + at * size;
  for (int64_t i = 0; i < kColumns * size; i += 64) __builtin_prefetch(line + i, 1);
}

using Finish = void (*)(const Linear&, const float* sums, int64_t row, int64_t rows, int64_t column);

template <Epilogue EPILOGUE, Activation ACTIVATION>
inline Finish finish_of(bool whole) {
  return whole ? finish_rows<EPILOGUE, ACTIVATION, true> : finish_rows<EPILOGUE, ACTIVATION, false>;
}

template <Epilogue EPILOGUE>
inline Finish finish_of(Activation activation, bool whole) {
  if (activation == Activation::gelu) return finish_of<EPILOGUE, Activation::gelu>(whole);
  if (activation == Activation::gelu_tanh) return finish_of<EPILOGUE, Activation::gelu_tanh>(whole);
  if (activation == Activation::quick_gelu) return finish_of<EPILOGUE, Activation::quick_gelu>(whole);
  return finish_of<EPILOGUE, Activation::silu>(whole);
}

// The function that makes results in the panel that starts at `column`.
inline Finish finish_of(const Linear& a, int64_t column) {
  const bool whole = a.N - column >= kColumns;
  if (a.epilogue == Epilogue::activate) return finish_of<Epilogue::activate>(a.activation, whole);
  if (a.epilogue == Epilogue::activate_bwd) return finish_of<Epilogue::activate_bwd>(a.activation, whole);
  return finish_of<Epilogue::none, Activation::gelu>(whole);
}

}  // namespace
