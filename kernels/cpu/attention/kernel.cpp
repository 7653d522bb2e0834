// The arithmetic of attention on one head of one image.
#include "attention.h"
#include "product.h"
#include "softmax.h"
#include "transpose.h"

namespace {

using namespace insvp_fast;

// One head of one image, and the scratch that is still free.
struct Head {
  const Attention& a;
  int64_t image, head;
  float* scratch;
  int64_t D = a.heads * a.d, words = Words::count(a.width), depth = Words::count(a.d);

  float* take(int64_t floats) {
    float* piece = scratch;
    scratch += floats;
    return piece;
  }
  float* tokens() { return take(a.tokens); }
  float* scores() { return take(a.scores); }

  // Where the head's queries (part 0), keys (1) or values (2) begin in qkv, and its numbers in out.
  int64_t in_qkv(int part) const { return (image * a.S * 3 + part) * D + head * a.d; }
  int64_t in_out() const { return image * a.T * D + head * a.d; }

  // Rows of a tensor, as words; a row ends with zeros.
  const float* read_rows(Array from, int64_t offset, int64_t row, int64_t rows) {
    float* to = tokens();
    for (int64_t j = 0; j < rows; ++j) {
      float* at = to + j * words;
      if (a.d < a.width) __builtin_memset(at, 0, words * sizeof(float));
      Words::read_numbers(at, from, offset + j * row, a.d);
    }
    return to;
  }
  const float* read_qkv(int part, int64_t rows) { return read_rows(a.qkv, in_qkv(part), 3 * D, rows); }

  void write_rows(Array to, int64_t offset, int64_t row, const float* from, int64_t rows) const {
    for (int64_t j = 0; j < rows; ++j, offset += row, from += a.width) write(to, offset, from, a.d);
  }
  void write_d_qkv(int part, int64_t first, const float* from, int64_t rows) const {
    write_rows(a.d_qkv, in_qkv(part) + first * 3 * D, 3 * D, from, rows);
  }

  const float* transposed(const float* rows) {
    float* columns = tokens();
    transpose(columns, a.stride, rows, words, a.S, depth);
    return columns;
  }
  const float* paired(const float* x, int64_t rows) { return Words::paired(tokens(), x, rows, a.width, words); }

  // The products of `count` rows of `x` with all rows of the matrix that `columns` is transposed from.
  void dot_products(float* to, const float* x, const float* columns, int64_t count, float scale) const {
    multiply({to, a.stride, false}, {x, words, 1}, {columns, a.stride}, count, a.S, depth, scale);
  }
};

void attention_fwd_head(const Attention& a, int64_t image, int64_t head, float* scratch) {
  Head h{a, image, head, scratch};
  const float *q = h.read_qkv(0, a.T), *k = h.read_qkv(1, a.S), *v = h.read_qkv(2, a.S);
  const float* k_columns = h.transposed(k);
  float *out = h.tokens(), *p = h.scores(), *p_words = h.scores();
  v = h.paired(v, a.S);

  for (int64_t t = 0; t < a.T; t += kQueries) {
    const int64_t count = smaller(kQueries, a.T - t);
    h.dot_products(p, q + t * h.words, k_columns, count, a.scale);
    softmax(p, count, a.S, a.stride);
    const float* rows = Words::narrow(p_words, p, count, a.stride);
    multiply({out, a.width, false}, {rows, Words::count(a.stride), 1}, {v, a.width}, count, a.d, Words::count(a.S),
             1.0f);
    h.write_rows(a.out, h.in_out() + t * h.D, h.D, out, count);
  }
}

void attention_bwd_head(const Attention& a, int64_t image, int64_t head, float* scratch) {
  Head h{a, image, head, scratch};
  const float *q = h.read_qkv(0, a.T), *k = h.read_qkv(1, a.S), *v = h.read_qkv(2, a.S);
  const float* grad = h.read_rows(a.out, h.in_out(), h.D, a.T);
  const float *k_columns = h.transposed(k), *v_columns = h.transposed(v);
  const float *q_pairs = h.paired(q, a.T), *k_pairs = h.paired(k, a.S), *grad_pairs = h.paired(grad, a.T);
  float *d_q = h.tokens(), *d_k = h.tokens(), *d_v = h.tokens();
  float *p = h.scores(), *d_p = h.scores(), *narrow = h.scores(), *pairs = h.scores();
  __builtin_memset(d_k, 0, a.S * a.width * sizeof(float));
  __builtin_memset(d_v, 0, a.S * a.width * sizeof(float));

  const int64_t stride = Words::count(a.stride);
  for (int64_t t = 0; t < a.T; t += kQueries) {
    const int64_t count = smaller(kQueries, a.T - t), along = Words::count(count);
    h.dot_products(p, q + t * h.words, k_columns, count, a.scale);
    h.dot_products(d_p, grad + t * h.words, v_columns, count, 1.0f);
    softmax(p, count, a.S, a.stride);
    softmax_bwd(d_p, p, count, a.S, a.stride);

    const float* p_pairs = Words::paired(pairs, Words::narrow(narrow, p, count, a.stride), count, a.stride, stride);
    multiply({d_v, a.width, true}, {p_pairs, 1, a.stride}, {grad_pairs + Words::count(t) * a.width, a.width}, a.S, a.d,
             along, 1.0f);
    const float* d_s = Words::narrow(narrow, d_p, count, a.stride);
    const float* d_s_pairs = Words::paired(pairs, d_s, count, a.stride, stride);
    multiply({d_k, a.width, true}, {d_s_pairs, 1, a.stride}, {q_pairs + Words::count(t) * a.width, a.width}, a.S, a.d,
             along, a.scale);
    multiply({d_q, a.width, false}, {d_s, stride, 1}, {k_pairs, a.width}, count, a.d, Words::count(a.S), a.scale);
    h.write_d_qkv(0, t, d_q, count);
  }
  h.write_d_qkv(1, 0, d_k, a.S);
  h.write_d_qkv(2, 0, d_v, a.S);
  __builtin_memset(d_q, 0, (a.S - a.T) * a.width * sizeof(float));
  h.write_d_qkv(0, a.T, d_q, a.S - a.T);
}

}  // namespace

template <>
const AttentionKernels& insvp_fast::kernels_for<AttentionKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr AttentionKernels kernels{attention_fwd_head, attention_bwd_head};
  return kernels;
}
