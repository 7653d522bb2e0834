// The arithmetic of attention on one head of one image.
#include "attention.h"
#include "common/amx.h"
#include "softmax.h"
#include "transpose.h"
#ifdef INSVP_FAST_AMX
#include "matrix_product.h"
#else
#include "vector_product.h"
#endif

namespace {

using namespace insvp_fast;

// One head of one window of an image, and the scratch that is still free. The rows of a matrix are those of the
// window's tokens, then those of the prompts.
struct Head {
  const Attention& a;
  int64_t image, head, window;
  float* scratch;
  int64_t D = a.heads * a.d, words = Words::count(a.width), depth = Words::depth(a.d);
  Soon soon = {};
  float* turned = nullptr;  // where `down` writes

  float* take(int64_t floats) {
    float* piece = scratch;
    scratch += floats;
    return piece;
  }
  float* tokens() { return take(a.tokens); }
  float* scores() { return take(a.scores); }

  // Where row j of the head's queries begins in qkv; `D` numbers later, those of its keys; then those of its values.
  int64_t in_qkv(int64_t j) const { return (image * (a.T + a.L) + in_image(j)) * 3 * D + head * a.d; }
  // Where its results begin in out.
  int64_t in_out(int64_t j) const { return (image * a.T + in_image(j)) * D + head * a.d; }
  int64_t in_image(int64_t j) const {
    if (j >= a.w) return a.T + j - a.w;
    return a.windows ? a.windows[window * a.w + j] : j;
  }

  // A row of a tensor, as words; it ends with zeros.
  void read_row(float* to, Array from, int64_t offset) const {
    if (a.d < a.width) __builtin_memset(to, 0, words * sizeof(float));
    Words::read_numbers(to, from, offset, a.d);
  }

  struct Inputs {
    const float *q, *k, *v;
  };
  Inputs read_qkv() {
    float *q = tokens(), *k = tokens(), *v = tokens();
    for (int64_t j = 0; j < a.S; ++j) {
      const int64_t row = in_qkv(j), to = j * words;
      if (j < a.w) read_row(q + to, a.qkv, row);
      read_row(k + to, a.qkv, row + D);
      read_row(v + to, a.qkv, row + 2 * D);
    }
    return {q, k, v};
  }
  const float* read_out() {
    float* to = tokens();
    for (int64_t j = 0; j < a.w; ++j) read_row(to + j * words, a.out, in_out(j));
    return to;
  }

  // Lets the products of this window prefetch what will be written, then what will be read next: the inputs of the next
  // window, or of the first one of the job that this thread will probably get next. All these rows are far apart.
  void expect(bool backward) {
    const char** line = reinterpret_cast<const char**>(take(a.lines));
    soon.next = line;
    const int64_t size = size_of(a.qkv.type), bytes = a.d * size, part = D * size;
    // Notes the lines of the head's numbers in the first rows of the window of `h`, in each of the parts of a row.
    const auto add = [&](const Head& h, Array array, int64_t rows, int64_t rows_of_image, auto parts) {
      const int64_t row = parts.value * part;
      const char* from = static_cast<const char*>(array.data) + h.image * rows_of_image * row + h.head * bytes;
      for (int64_t j = 0; j < rows; ++j) {
        const char* at = from + h.in_image(j) * row;
        for (int p = 0; p < parts.value; ++p, at += part)
          for (int64_t i = 0; i < bytes; i += 64) *line++ = at + i;
      }
    };
    const auto add_qkv = [&](const Head& h, Array qkv, int64_t rows) { add(h, qkv, rows, a.T + a.L, constant<3>{}); };
    const auto add_out = [&](const Head& h) { add(h, a.out, a.w, a.T, constant<1>{}); };
    if (bytes > 64) {  // shorter rows gain less than their addresses cost
      if (backward) add_qkv(*this, a.d_qkv, a.w);
      else add_out(*this);
    }
    soon.end = line;

    Head next = *this;
    if (++next.window == a.n) {
      const int64_t job = image * a.heads + head + 1;
      next.image = job / a.heads, next.head = job % a.heads, next.window = 0;
    }
    if (next.image >= a.B) return;
    add_qkv(next, a.qkv, next.window ? a.w : a.S);  // the prompts of this head have been read
    if (backward) add_out(next);
    soon.end = line;
  }

  // Rows from `first` to `end`; `from` is where the first one is.
  void write_out(int64_t first, int64_t end, const float* from, const float* factor) const {
    for (int64_t j = first; j < end; ++j, from += a.width) write(a.out, in_out(j), from, a.d, *factor++);
  }
  void write_d_qkv(int part, int64_t first, int64_t end, const float* from) const {
    for (int64_t j = first; j < end; ++j, from += a.width) write(a.d_qkv, in_qkv(j) + part * D, from, a.d);
  }

  const float* transposed(const float* rows) {
    float* columns = tokens();
    transpose(columns, a.stride, rows, words, a.S, depth);
    return columns;
  }
  const float* paired(const float* x, int64_t rows) { return Words::paired(tokens(), x, rows, a.width, words); }

  // The first operand of sums over the `count` rows of x, which are words for such sums.
  Elements down(const float* x, [[maybe_unused]] int64_t count) {
#ifdef INSVP_FAST_AMX
    const int64_t stride = Words::depth(a.queries);
    transpose(turned, stride, x, a.stride, Words::count(count), a.S);
    return {turned, stride, 1};
#else
    return {x, 1, a.stride};
#endif
  }

  // The products of `count` rows of `x` with all rows of the matrix that `columns` is transposed from.
  void dot_products(float* to, const float* x, const float* columns, int64_t count) {
    multiply({to, a.stride, false}, {x, words, 1}, {columns, a.stride}, count, a.S, depth, soon);
  }

  // How the scores of the query t and those after it come from products.
  Scores scores_from(int64_t t) const {
    return {a.scale, a.bias ? a.bias + (head * a.w + t) * a.w : nullptr,
            a.mask ? a.mask + (window * a.w + t) * a.w : nullptr, a.w};
  }
};

void attention_fwd_window(Head h) {
  const Attention& a = h.a;
  const auto [q, k, v] = h.read_qkv();
  h.expect(false);
  const float *k_columns = h.transposed(k), *v_pairs = h.paired(v, a.S);
  float *out = h.tokens(), *x = h.scores(), *p = Words::kNumbers > 1 ? h.scores() : x;
  float factor[kMostQueries];

  for (int64_t t = 0; t < a.w; t += a.queries) {
    const int64_t count = smaller(a.queries, a.w - t);
    h.dot_products(x, q + t * h.words, k_columns, count);
    softmax(p, factor, x, count, a.S, a.stride, h.scores_from(t));
    multiply({out, a.width, false}, {p, Words::count(a.stride), 1}, {v_pairs, a.width}, count, a.d, Words::depth(a.S),
             h.soon);
    h.write_out(t, t + count, out, factor);
  }
}

// Adds to the last L rows of d_k and d_v, which are the prompts', and writes the others.
void attention_bwd_window(Head h, float* d_k, float* d_v) {
  const Attention& a = h.a;
  const auto [q, k, v] = h.read_qkv();
  const float* grad = h.read_out();
  h.expect(true);
  const float *k_columns = h.transposed(k), *v_columns = h.transposed(v);
  const float *q_pairs = h.paired(q, a.w), *k_pairs = h.paired(k, a.S), *grad_pairs = h.paired(grad, a.w);
  if (kStep > 1) h.turned = h.tokens();
  float *d_q = h.tokens(), *p = h.scores(), *d = h.scores(), *d_words = Words::kNumbers > 1 ? h.scores() : d;
  __builtin_memset(d_k, 0, a.w * a.width * sizeof(float));
  __builtin_memset(d_v, 0, a.w * a.width * sizeof(float));

  for (int64_t t = 0; t < a.w; t += a.queries) {
    const int64_t count = smaller(a.queries, a.w - t), along = Words::depth(count), from = Words::count(t) * a.width;
    h.dot_products(p, q + t * h.words, k_columns, count);
    h.dot_products(d, grad + t * h.words, v_columns, count);
    softmax_bwd(d, p, d_words, count, a.S, a.stride, h.scores_from(t));
    multiply({d_v, a.width, true}, h.down(p, count), {grad_pairs + from, a.width}, a.S, a.d, along, h.soon);
    multiply({d_k, a.width, true}, h.down(d, count), {q_pairs + from, a.width}, a.S, a.d, along, h.soon);
    multiply({d_q, a.width, false}, {d_words, Words::count(a.stride), 1}, {k_pairs, a.width}, count, a.d,
             Words::depth(a.S), h.soon);
    h.write_d_qkv(0, t, t + count, d_q);
  }
  h.write_d_qkv(1, 0, a.w, d_k);
  h.write_d_qkv(2, 0, a.w, d_v);
}

void attention_fwd_head(const Attention& a, int64_t image, int64_t head, float* scratch) {
  [[maybe_unused]] const TileShapes shapes;
  for (int64_t window = 0; window < a.n; ++window) attention_fwd_window({a, image, head, window, scratch});
}

void attention_bwd_head(const Attention& a, int64_t image, int64_t head, float* scratch) {
  [[maybe_unused]] const TileShapes shapes;
  Head h{a, image, head, 0, scratch};
  float *d_k = h.tokens(), *d_v = h.tokens();
  const int64_t prompts = a.w * a.width, size = a.L * a.width * sizeof(float);
  __builtin_memset(d_k + prompts, 0, size);
  __builtin_memset(d_v + prompts, 0, size);
  for (; h.window < a.n; ++h.window) attention_bwd_window(h, d_k, d_v);
  h.write_d_qkv(1, a.w, a.S, d_k + prompts);
  h.write_d_qkv(2, a.w, a.S, d_v + prompts);
  __builtin_memset(d_k, 0, size);  // the prompts do not ask
  h.write_d_qkv(0, a.w, a.S, d_k);
}

}  // namespace

template <>
const AttentionKernels& insvp_fast::kernels_for<AttentionKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr AttentionKernels kernels{Words::kNumbers * kStep, attention_fwd_head, attention_bwd_head};
  return kernels;
}
