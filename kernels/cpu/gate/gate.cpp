// gate: the hidden layer of a gated MLP from its two products, with a LayerNorm behind it or without; forward and
// backward. The C functions and the threads are here, the arithmetic is in kernel.cpp.
#include "gate.h"

#include "common/host.h"
#include "common/step.h"

namespace insvp_fast {
namespace {

template <class Args>
int for_rows(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t scratch_rows,
             int64_t rows, int threads) {
  constexpr int64_t size = 1 << 14;  // numbers of a job, or a row
  const int64_t scratch_size = args.normalize ? scratch_rows * whole_lines(args.D) : 0;
  const int64_t step = larger(size / larger(args.D, 1), 1), jobs = ceil_div(rows, step);
  threads = useful_threads(threads, jobs);
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;
  for_each_job(jobs, threads, memory.base, scratch_size, [&](int64_t job, float* own) {
    kernel(args, job * step, smaller(rows, (job + 1) * step), own);
  });
  return 0;
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 if there is no memory for the workspace. A null pointer is an absent tensor.

INSVP_FAST_API int gate_fwd(void* hidden, int hidden_type, void* pre, int pre_type, void* factor, int factor_type,
                            int activation, int normalize, float eps, int64_t rows, int64_t D, int threads) {
  const GateFwd args{D, Activation(activation), normalize != 0, eps, {hidden, DType(hidden_type)},
                     {pre, DType(pre_type)}, {factor, DType(factor_type)}};
  return for_rows(best_kernels<GateKernels>(isa()).fwd, args, GateKernels::fwd_scratch, rows, threads);
}

INSVP_FAST_API int gate_bwd(void* d_pre, int d_pre_type, void* d_factor, int d_factor_type, void* d_hidden,
                            int d_hidden_type, void* pre, int pre_type, void* factor, int factor_type, int activation,
                            int normalize, float eps, int64_t rows, int64_t D, int threads) {
  const GateBwd args{D, Activation(activation), normalize != 0, eps, {d_pre, DType(d_pre_type)},
                     {d_factor, DType(d_factor_type)}, {d_hidden, DType(d_hidden_type)}, {pre, DType(pre_type)},
                     {factor, DType(factor_type)}};
  return for_rows(best_kernels<GateKernels>(isa()).bwd, args, GateKernels::bwd_scratch, rows, threads);
}

INSVP_FAST_STEP(gate_fwd)
INSVP_FAST_STEP(gate_bwd)
