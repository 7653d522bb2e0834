// norm_insert: residual addition, then LayerNorm, or RMSNorm without `center`, of tokens and prompts into one buffer;
// forward and backward. The C functions and the threads are here, the arithmetic is in kernel.cpp.
#include "norm_insert.h"

#include "common/host.h"
#include "common/step.h"

namespace insvp_fast {
namespace {

template <class Args>
int for_rows(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t B, int threads) {
  const int64_t rows = B * (args.T + args.L), scratch_size = whole_lines(args.D);
  threads = useful_threads(threads, rows);
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;
  for_each_job(threads, threads, memory.base, scratch_size, [&](int64_t t, float* own) {
    kernel(args, rows * t / threads, rows * (t + 1) / threads, own);
  });
  return 0;
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 if there is no memory for the workspace. A null pointer is an absent tensor. All tensors are
// contiguous, the prompts within an image.

INSVP_FAST_API int norm_insert_fwd(
    void* residual, int residual_type, void* branch, int branch_type, void* prompts, int prompts_type,
    int64_t prompts_stride, const float* weight, const float* bias, float eps, int center, void* total, int total_type,
    void* normed, int normed_type, void* xhat, int xhat_type, float* rstd, int64_t B, int64_t T, int64_t L, int64_t D,
    int threads) {
  const NormInsertFwd args{
      T, L, D, {residual, DType(residual_type)}, {branch, DType(branch_type)}, {prompts, DType(prompts_type)},
      prompts_stride, weight, bias, eps, center != 0, {total, DType(total_type)}, {normed, DType(normed_type)},
      {xhat, DType(xhat_type)}, rstd};
  return for_rows(best_kernels<NormInsertKernels>(isa()).fwd, args, B, threads);
}

INSVP_FAST_API int norm_insert_bwd(
    void* grad_total, int grad_total_type, void* grad_normed, int grad_normed_type, void* xhat, int xhat_type,
    const float* rstd, const float* weight, int center, void* d_residual, int d_residual_type, void* d_branch,
    int d_branch_type, void* d_prompts, int d_prompts_type, int64_t B, int64_t T, int64_t L, int64_t D, int threads) {
  const NormInsertBwd args{
      T, L, D, {grad_total, DType(grad_total_type)}, {grad_normed, DType(grad_normed_type)}, {xhat, DType(xhat_type)},
      rstd, weight, center != 0, {d_residual, DType(d_residual_type)}, {d_branch, DType(d_branch_type)},
      {d_prompts, DType(d_prompts_type)}};
  return for_rows(best_kernels<NormInsertKernels>(isa()).bwd, args, B, threads);
}

INSVP_FAST_STEP(norm_insert_fwd)
INSVP_FAST_STEP(norm_insert_bwd)
