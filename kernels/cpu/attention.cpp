// attention: softmax attention of the first T tokens to all S, from the packed product of queries, keys and values.
// Here: the C functions, the threads. The arithmetic is in attention_kernel.h.
#include "attention.h"

#include "host.h"

namespace insvp_fast {
namespace {

const AttentionKernels& kernels([[maybe_unused]] DType type) {
#ifdef INSVP_FAST_X86
  if (isa() >= Isa::avx512_bf16 && type == DType::bf16) return attention_avx512_bf16;
  if (isa() >= Isa::avx512) return attention_avx512;
  if (isa() >= Isa::avx2) return attention_avx2;
#endif
  return attention_generic;
}

Attention arguments(
    Array qkv, Array out, Array d_qkv, int64_t S, int64_t T, int64_t heads, int64_t d, float scale) {
  Attention a{qkv, out, d_qkv, S, T, heads, d, scale, 0, 0, 0, 0};
  a.width = ceil_div(d, 16) * 16;
  a.stride = ceil_div(S, 16) % 2 ? ceil_div(S, 16) * 16 : ceil_div(S, 16) * 16 + 16;
  a.tokens = larger((S + 1) * a.width, d * a.stride);
  a.scores = kQueries * a.stride;
  return a;
}

template <class Kernel>
int for_each_head(const Attention& a, int64_t B, int64_t scratch_size, int threads, Kernel kernel) {
  threads = static_cast<int>(larger(1, smaller(threads, B * a.heads)));
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < B * a.heads; ++i)
    kernel(a, i / a.heads, i % a.heads, memory.base + thread_id() * scratch_size);
  return 0;
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 where the workspace cannot be had. Tensors are contiguous and of one type: qkv and d_qkv
// [B, S, 3*D], out and its gradient [B, T, D], D = heads * d.

INSVP_FAST_API int attention_fwd(
    void* qkv, int qkv_type, void* out, int64_t B, int64_t S, int64_t T, int64_t heads, int64_t d, float scale,
    int threads) {
  const DType type = DType(qkv_type);
  const Attention a = arguments({qkv, type}, {out, type}, {nullptr, type}, S, T, heads, d, scale);
  return for_each_head(a, B, kFwdTokens * a.tokens + kFwdScores * a.scores, threads, kernels(type).fwd);
}

INSVP_FAST_API int attention_bwd(
    void* grad, void* qkv, int qkv_type, void* d_qkv, int64_t B, int64_t S, int64_t T, int64_t heads, int64_t d,
    float scale, int threads) {
  const DType type = DType(qkv_type);
  const Attention a = arguments({qkv, type}, {grad, type}, {d_qkv, type}, S, T, heads, d, scale);
  return for_each_head(a, B, kBwdTokens * a.tokens + kBwdScores * a.scores, threads, kernels(type).bwd);
}
