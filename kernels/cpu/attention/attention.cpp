// attention: softmax attention of the tokens of a window to one another and to the prompts, from the packed projection
// to queries, keys and values. The C functions and the threads are here, the arithmetic is in kernel.cpp.
#include "attention.h"

#include <cstring>

#include "common/host.h"
#include "common/step.h"

namespace insvp_fast {
namespace {

// The kernels for pairs of bf16 take qkv in bf16 only.
const AttentionKernels& kernels(DType type) {
  return best_kernels<AttentionKernels>(type == DType::bf16 ? isa() : isa(Isa::avx512));
}

// What forward and backward have in common.
Attention attention(Array qkv, Array out, Array d_qkv, const int32_t* windows, const float* bias,
                    const float* mask, int64_t B, int64_t n, int64_t w, int64_t L, int64_t heads, int64_t d,
                    float scale) {
  Attention a{qkv, out, d_qkv, windows, bias, mask, B, n, w, L, heads, d, scale, n * w, w + L, 0, 0, 0, 0, 0, 0};
  const int64_t step = kernels(qkv.type).step;
  const bool tiles = step > kLine;
  a.width = round_up(d, larger(kLine, step));
  a.stride = tiles ? round_up(a.S, step) : a.S <= 64 ? whole_lines(a.S) : odd_lines(a.S);
  a.queries = tiles ? smaller(kMostQueries, round_up(w, step)) : block_of_queries(w);
  a.tokens = tiles ? a.stride * larger(a.width, a.queries / 2) : larger((a.S + 1) * a.width, d * a.stride);
  a.scores = a.queries * a.stride;
  a.lines = whole_lines(2 * (7 * w + 3 * L) * ceil_div(d * size_of(qkv.type), 64));
  return a;
}

Array from(Array array, int64_t offset) {
  return {array.data ? static_cast<char*>(array.data) + offset * size_of(array.type) : nullptr, array.type};
}

// One image alone, with its first L prompts.
Attention cut(const Attention& a, int64_t image, int64_t L) {
  const int64_t D = a.heads * a.d, in_qkv = image * (a.T + a.L) * 3 * D;
  return attention(from(a.qkv, in_qkv), from(a.out, image * a.T * D), from(a.d_qkv, in_qkv), a.windows, a.bias, a.mask,
                   1, a.n, a.w, L, a.heads, a.d, a.scale);
}

template <class Kernel>
int for_each_head(const Attention& a, const int64_t* num_keys, int64_t scratch_size, int threads, Kernel kernel) {
  const int64_t jobs = a.B * a.heads;
  threads = useful_threads(threads, jobs);
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;
  for_each_job(jobs, threads, memory.base, scratch_size, [&](int64_t job, float* own) {
    const int64_t image = job / a.heads, head = job % a.heads;
    if (num_keys) kernel(cut(a, image, num_keys[image] - a.T), 0, head, own);
    else kernel(a, image, head, own);
  });
  return 0;
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 if there is no memory for the workspace. Tensors are contiguous; qkv and d_qkv [B, T+L, 3*D],
// out and its gradient [B, T, D] are of one type, with T = n * w and D = heads * d. `windows`, `bias` and `mask`: see
// attention.h; each token has to stand in exactly one window. Of image b, num_keys[b] rows are tokens and prompts, the
// others are padding, whose gradient is zero; without num_keys all T+L are.

INSVP_FAST_API int attention_fwd(
    void* qkv, int qkv_type, const int32_t* windows, const float* bias, const float* mask, const int64_t* num_keys,
    void* out, int64_t B, int64_t n, int64_t w, int64_t L, int64_t heads, int64_t d, float scale, int threads) {
  const DType type = DType(qkv_type);
  const Attention a =
      attention({qkv, type}, {out, type}, {nullptr, type}, windows, bias, mask, B, n, w, L, heads, d, scale);
  const int64_t scratch_size = kFwdTokens * a.tokens + kFwdScores * a.scores + a.lines;
  return for_each_head(a, num_keys, scratch_size, threads, kernels(type).fwd);
}

// Whether windows of `count` tokens in all hold each of the tokens 0 to count - 1 once: 1 or 0; -1 without memory.
INSVP_FAST_API int attention_windows_hold_all(const int32_t* windows, int64_t count) {
  Workspace memory(ceil_div(count, 4));
  if (!memory.base) return -1;
  char* seen = reinterpret_cast<char*>(memory.base);
  __builtin_memset(seen, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = windows[i];
    if (token < 0 || token >= count || seen[token]) return 0;
    seen[token] = 1;
  }
  return 1;
}

INSVP_FAST_API int attention_bwd(
    void* grad, void* qkv, int qkv_type, const int32_t* windows, const float* bias, const float* mask,
    const int64_t* num_keys, void* d_qkv, int64_t B, int64_t n, int64_t w, int64_t L, int64_t heads, int64_t d,
    float scale, int threads) {
  const DType type = DType(qkv_type);
  const Attention a =
      attention({qkv, type}, {grad, type}, {d_qkv, type}, windows, bias, mask, B, n, w, L, heads, d, scale);
  for (int64_t b = 0; num_keys && b < B; ++b) {
    const int64_t row = 3 * heads * d, rows = a.T + L, behind = (rows - num_keys[b]) * row * size_of(type);
    std::memset(from(a.d_qkv, (b * rows + num_keys[b]) * row).data, 0, behind);
  }
  const int64_t scratch_size = kBwdTokens * a.tokens + kBwdScores * a.scores + a.lines;
  return for_each_head(a, num_keys, scratch_size, threads, kernels(type).bwd);
}

INSVP_FAST_STEP(attention_fwd)
INSVP_FAST_STEP(attention_bwd)
