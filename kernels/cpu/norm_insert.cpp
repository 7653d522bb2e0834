// norm_insert: residual addition, LayerNorm of tokens and prompts, one buffer for both; forward and backward.
// Here: the C functions and the threads. The arithmetic is in norm_insert_kernel.h.
#include "norm_insert.h"

#include "host.h"

namespace insvp_fast {
namespace {

const NormInsertKernels& kernels() {
#ifdef INSVP_FAST_X86
  if (isa() >= Isa::avx512) return norm_insert_avx512;
  if (isa() >= Isa::avx2) return norm_insert_avx2;
#endif
  return norm_insert_generic;
}

template <class Args>
int for_rows(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t B, int threads) {
  const int64_t rows = B * (args.T + args.L), scratch_size = ceil_div(args.D, 16) * 16;
  threads = static_cast<int>(larger(1, smaller(threads, rows)));
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < threads; ++t)
    kernel(args, rows * t / threads, rows * (t + 1) / threads, memory.base + t * scratch_size);
  return 0;
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 where the workspace cannot be had. Null memory is an absent tensor. All tensors are contiguous,
// the prompts within an image.

INSVP_FAST_API int norm_insert_fwd(
    void* residual, int residual_type, void* branch, int branch_type, void* prompts, int prompts_type,
    int64_t prompts_stride, const float* weight, const float* bias, float eps, void* total, int total_type,
    void* normed, int normed_type, void* xhat, int xhat_type, float* rstd, int64_t B, int64_t T, int64_t L, int64_t D,
    int threads) {
  const NormInsertFwd args{
      T, L, D, {residual, DType(residual_type)}, {branch, DType(branch_type)}, {prompts, DType(prompts_type)},
      prompts_stride, weight, bias, eps, {total, DType(total_type)}, {normed, DType(normed_type)},
      {xhat, DType(xhat_type)}, rstd};
  return for_rows(kernels().fwd, args, B, threads);
}

INSVP_FAST_API int norm_insert_bwd(
    void* grad_total, int grad_total_type, void* grad_normed, int grad_normed_type, void* xhat, int xhat_type,
    const float* rstd, const float* weight, void* d_residual, int d_residual_type, void* d_branch, int d_branch_type,
    void* d_prompts, int d_prompts_type, int64_t B, int64_t T, int64_t L, int64_t D, int threads) {
  const NormInsertBwd args{
      T, L, D, {grad_total, DType(grad_total_type)}, {grad_normed, DType(grad_normed_type)}, {xhat, DType(xhat_type)},
      rstd, weight, {d_residual, DType(d_residual_type)}, {d_branch, DType(d_branch_type)},
      {d_prompts, DType(d_prompts_type)}};
  return for_rows(kernels().bwd, args, B, threads);
}
