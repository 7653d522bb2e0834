// attention on one head of one image, for the vector width of the including file.
//
// All products have one form: c = a @ b, with rows of c and of b in vectors and single elements of a. They are made of
// 32-bit words: floats, or pairs of bf16 numbers that lie next to each other along the sum. `Words` says which:
//   mul_add            c + a word of a * a vector of words of b
//   count(n)           the words of n numbers along the sum
//   read, narrow       rows of numbers, from a tensor or from floats
//   paired             the same matrix with the numbers of a word taken from two rows instead of two columns
#pragma once
#include "attention.h"
#include "exp.h"
#include "vec.h"

namespace {

using namespace insvp_fast;

struct Floats {
  static vec mul_add(vec c, const float* a, vec b) { return c + *a * b; }
  static int64_t count(int64_t n) { return n; }
  static void read(float* to, Array from, int64_t offset, int64_t n) {
    if (from.type == DType::f32) copy(to, static_cast<const float*>(from.data) + offset, n, 1.0f);
    else copy(to, static_cast<const bf16*>(from.data) + offset, n, 1.0f);
  }
  static const float* narrow(float*, const float* x, int64_t, int64_t) { return x; }
  static const float* paired(float*, const float* x, int64_t, int64_t, int64_t) { return x; }
};

// Element (m, k) of a product's first operand is at m * row + k * depth.
struct Elements {
  const float* data;
  int64_t row, depth;
};

struct Rows {
  const float* data;
  int64_t stride;
};

struct Sums {
  float* data;
  int64_t stride;
  bool add;  // to what is there
};

// Sums, vectors of b and one element of a fill the registers.
constexpr int kRows = kWidth == 16 ? 6 : 4, kVectors = kWidth == 16 ? 4 : 3;

template <class Words, int ROWS, int VECTORS>
inline void tile(Sums c, Elements a, Rows b, int64_t depth, float scale) {
  vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[j][v] = vec{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vec bk[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) bk[v] = load(b.data + k * b.stride + v * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[j][v] = Words::mul_add(acc[j][v], a.data + j * a.row + k * a.depth, bk[v]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < ROWS; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c.data + j * c.stride + v * kWidth;
      store(to, c.add ? load(to) + scale * acc[j][v] : scale * acc[j][v]);
    }
}

// A tile of any size up to ROWS x VECTORS.
template <class Words, int ROWS, int VECTORS, class... Arguments>
inline void tile_of(int64_t rows, int64_t vectors, Arguments... arguments) {
  if (rows == ROWS && vectors == VECTORS) return tile<Words, ROWS, VECTORS>(arguments...);
  if constexpr (VECTORS > 1)
    if (vectors < VECTORS) return tile_of<Words, ROWS, VECTORS - 1>(rows, vectors, arguments...);
  if constexpr (ROWS > 1) tile_of<Words, ROWS - 1, VECTORS>(rows, vectors, arguments...);
}

// c [rows, columns] = scale * a [rows, depth] @ b [depth, columns], columns rounded up to whole vectors, depth in words
template <class Words>
void multiply(Sums c, Elements a, Rows b, int64_t rows, int64_t columns, int64_t depth, float scale) {
  const int64_t vectors = (columns + kWidth - 1) / kWidth, panels = (vectors + kVectors - 1) / kVectors;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * vectors / panels, count = (p + 1) * vectors / panels - first, n = first * kWidth;
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t height = m + kRows < rows ? kRows : rows - m;
      tile_of<Words, kRows, kVectors>(height, count, Sums{c.data + m * c.stride + n, c.stride, c.add},
                                      Elements{a.data + m * a.row, a.row, a.depth}, Rows{b.data + n, b.stride}, depth,
                                      scale);
    }
  }
}

// The lower and the upper half of a and b, their elements in turn.
template <int HALF>
inline vec zip(vec a, vec b) {
  constexpr int W = kWidth, h = HALF * kWidth / 2;
  if constexpr (W == 16)
    return __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, h + 4, h + 20, h + 5,
                                   h + 21, h + 6, h + 22, h + 7, h + 23);
  else if constexpr (W == 8)
    return __builtin_shufflevector(a, b, h, h + 8, h + 1, h + 9, h + 2, h + 10, h + 3, h + 11);
  else
    return __builtin_shufflevector(a, b, h, h + 4, h + 1, h + 5);
}

// A sum or maximum of all elements, in each element.
template <class Operation>
inline vec reduce(vec v, Operation operation) {
#pragma GCC unroll 4
  for (int n = 1; n < kWidth; n *= 2) v = operation(zip<0>(v, v), zip<1>(v, v));
  return v;
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline vec add(vec a, vec b) { return a + b; }

// to [columns, stride] = from [rows, width] transposed; each row of it ends with zeros up to a whole vector.
inline void transpose(float* to, int64_t stride, const float* from, int64_t width, int64_t rows, int64_t columns) {
  for (int64_t n = 0; n < rows; n += kWidth)
    for (int64_t k = 0; k < columns; k += kWidth) {
      vec block[kWidth], next[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) block[i] = n + i < rows ? load(from + (n + i) * width + k) : vec{};
#pragma GCC unroll 4
      for (int step = 1; step < kWidth; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kWidth / 2; ++i) {
          next[2 * i] = zip<0>(block[i], block[i + kWidth / 2]);
          next[2 * i + 1] = zip<1>(block[i], block[i + kWidth / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) block[i] = next[i];
      }
      for (int i = 0; i < kWidth && k + i < columns; ++i) store(to + (k + i) * stride + n, block[i]);
    }
}

// The softmax of each row, in place; what follows its `count` columns up to a whole vector becomes zero.
inline void softmax(float* x, int64_t rows, int64_t count, int64_t stride) {
  const int64_t end = (count + kWidth - 1) / kWidth * kWidth;
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = count; i < end; ++i) x[j * stride + i] = -__builtin_inff();
  for (int64_t j = 0; j < rows; ++j, x += stride) {
    vec most = load(x), total = {};
    for (int64_t i = kWidth; i < end; i += kWidth) most = larger(load(x + i), most);
    most = reduce(most, larger);
    for (int64_t i = 0; i < end; i += kWidth) {
      const vec e = exp(load(x + i) - most);
      total += e;
      store(x + i, e);
    }
    const vec factor = 1.0f / reduce(total, add);
    for (int64_t i = 0; i < end; i += kWidth) store(x + i, factor * load(x + i));
  }
}

// The gradient of the scores, in place of that of the probabilities p.
inline void softmax_bwd(float* dp, const float* p, int64_t rows, int64_t count, int64_t stride) {
  for (int64_t j = 0; j < rows; ++j, p += stride, dp += stride) {
    vec products = {};
    for (int64_t i = 0; i < count; i += kWidth) products += load(p + i) * load(dp + i);
    const vec delta = reduce(products, add);
    for (int64_t i = 0; i < count; i += kWidth) store(dp + i, load(p + i) * (load(dp + i) - delta));
  }
}

// Where a head's queries (part 0), keys (1) or values (2) begin in qkv, or its part of an image in out.
inline int64_t in_qkv(const Attention& a, int64_t image, int64_t head, int part) {
  return (image * a.S * 3 + part) * a.heads * a.d + head * a.d;
}

inline int64_t in_out(const Attention& a, int64_t image, int64_t head) {
  return image * a.T * a.heads * a.d + head * a.d;
}

struct Scratch {
  const Attention& a;
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
  float* tokens() { return take(a.tokens); }
  float* scores() { return take(a.scores); }
};

// One head of a tensor, as rows of words that end with zeros.
template <class Words>
const float* read(Scratch& scratch, Array from, int64_t offset, int64_t row, int64_t rows) {
  const Attention& a = scratch.a;
  float* to = scratch.tokens();
  for (int64_t j = 0; j < rows; ++j) {
    float* words = to + j * Words::count(a.width);
    if (a.d < a.width) __builtin_memset(words, 0, Words::count(a.width) * sizeof(float));
    Words::read(words, from, offset + j * row, a.d);
  }
  return to;
}

inline void write(const Attention& a, Array to, int64_t offset, int64_t row, const float* from, int64_t rows) {
  for (int64_t j = 0; j < rows; ++j, offset += row, from += a.width)
    if (to.type == DType::f32) copy(static_cast<float*>(to.data) + offset, from, a.d, 1.0f);
    else copy(static_cast<bf16*>(to.data) + offset, from, a.d, 1.0f);
}

template <class Words>
void attention_fwd_head(const Attention& a, int64_t image, int64_t head, float* memory) {
  Scratch scratch{a, memory};
  const int64_t D = a.heads * a.d, words = Words::count(a.width), depth = Words::count(a.d);
  const float* q = read<Words>(scratch, a.qkv, in_qkv(a, image, head, 0), 3 * D, a.T);
  const float* k = read<Words>(scratch, a.qkv, in_qkv(a, image, head, 1), 3 * D, a.S);
  const float* v = read<Words>(scratch, a.qkv, in_qkv(a, image, head, 2), 3 * D, a.S);
  float *k_columns = scratch.tokens(), *out = scratch.tokens(), *p = scratch.scores(), *p_words = scratch.scores();
  transpose(k_columns, a.stride, k, words, a.S, depth);
  v = Words::paired(scratch.tokens(), v, a.S, a.width, words);

  for (int64_t t = 0; t < a.T; t += kQueries) {
    const int64_t count = t + kQueries < a.T ? kQueries : a.T - t;
    multiply<Words>({p, a.stride, false}, {q + t * words, words, 1}, {k_columns, a.stride}, count, a.S, depth, a.scale);
    softmax(p, count, a.S, a.stride);
    const float* rows = Words::narrow(p_words, p, count, a.stride);
    multiply<Words>({out, a.width, false}, {rows, Words::count(a.stride), 1}, {v, a.width}, count, a.d,
                    Words::count(a.S), 1.0f);
    write(a, a.out, in_out(a, image, head) + t * D, D, out, count);
  }
}

template <class Words>
void attention_bwd_head(const Attention& a, int64_t image, int64_t head, float* memory) {
  Scratch scratch{a, memory};
  const int64_t D = a.heads * a.d, words = Words::count(a.width), depth = Words::count(a.d);
  const float* q = read<Words>(scratch, a.qkv, in_qkv(a, image, head, 0), 3 * D, a.T);
  const float* k = read<Words>(scratch, a.qkv, in_qkv(a, image, head, 1), 3 * D, a.S);
  const float* v = read<Words>(scratch, a.qkv, in_qkv(a, image, head, 2), 3 * D, a.S);
  const float* grad = read<Words>(scratch, a.out, in_out(a, image, head), D, a.T);
  float *k_columns = scratch.tokens(), *v_columns = scratch.tokens();
  transpose(k_columns, a.stride, k, words, a.S, depth);
  transpose(v_columns, a.stride, v, words, a.S, depth);
  const float* q_pairs = Words::paired(scratch.tokens(), q, a.T, a.width, words);
  const float* k_pairs = Words::paired(scratch.tokens(), k, a.S, a.width, words);
  const float* grad_pairs = Words::paired(scratch.tokens(), grad, a.T, a.width, words);
  float *d_q = scratch.tokens(), *d_k = scratch.tokens(), *d_v = scratch.tokens();
  float *p = scratch.scores(), *d_p = scratch.scores(), *narrow = scratch.scores(), *pairs = scratch.scores();
  __builtin_memset(d_k, 0, a.S * a.width * sizeof(float));
  __builtin_memset(d_v, 0, a.S * a.width * sizeof(float));

  for (int64_t t = 0; t < a.T; t += kQueries) {
    const int64_t count = t + kQueries < a.T ? kQueries : a.T - t;
    const int64_t stride = Words::count(a.stride), along = Words::count(count);
    multiply<Words>({p, a.stride, false}, {q + t * words, words, 1}, {k_columns, a.stride}, count, a.S, depth, a.scale);
    multiply<Words>({d_p, a.stride, false}, {grad + t * words, words, 1}, {v_columns, a.stride}, count, a.S, depth,
                    1.0f);
    softmax(p, count, a.S, a.stride);
    softmax_bwd(d_p, p, count, a.S, a.stride);

    const float* p_pairs =
        Words::paired(pairs, Words::narrow(narrow, p, count, a.stride), count, a.stride, stride);
    multiply<Words>({d_v, a.width, true}, {p_pairs, 1, a.stride}, {grad_pairs + Words::count(t) * a.width, a.width},
                    a.S, a.d, along, 1.0f);
    const float* d_s = Words::narrow(narrow, d_p, count, a.stride);
    const float* d_s_pairs = Words::paired(pairs, d_s, count, a.stride, stride);
    multiply<Words>({d_k, a.width, true}, {d_s_pairs, 1, a.stride}, {q_pairs + Words::count(t) * a.width, a.width},
                    a.S, a.d, along, a.scale);
    multiply<Words>({d_q, a.width, false}, {d_s, stride, 1}, {k_pairs, a.width}, count, a.d, Words::count(a.S),
                    a.scale);
    write(a, a.d_qkv, in_qkv(a, image, head, 0) + t * 3 * D, 3 * D, d_q, count);
  }
  write(a, a.d_qkv, in_qkv(a, image, head, 1), 3 * D, d_k, a.S);
  write(a, a.d_qkv, in_qkv(a, image, head, 2), 3 * D, d_v, a.S);
  __builtin_memset(d_q, 0, (a.S - a.T) * a.width * sizeof(float));
  write(a, a.d_qkv, in_qkv(a, image, head, 0) + a.T * 3 * D, 3 * D, d_q, a.S - a.T);
}

}  // namespace
