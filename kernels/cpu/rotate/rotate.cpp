// rotate: rotary position embedding of packed queries and keys, forward and backward. The C function and the threads
// are here, the arithmetic is in kernel.cpp.
#include "rotate.h"

#include "common/host.h"
#include "common/step.h"

using namespace insvp_fast;

// For B images; see rotate.h.
INSVP_FAST_API int rotate(
    void* to, int to_type, void* from, int from_type, int64_t B, int64_t S, int64_t first, int64_t N, int64_t parts,
    int64_t heads, int64_t d, const float* rotation, int64_t head_stride, int half, int forward, int threads) {
  constexpr int64_t size = 1 << 14;  // numbers of a job, or a row
  const auto run = best_kernels<RotateKernels>(isa()).run;
  const Rotate args{{to, DType(to_type)}, {from, DType(from_type)}, S, first, N, parts, heads, d, rotation, head_stride,
                    half != 0, forward != 0};
  const int64_t rows = larger(size / ((parts + 1) * heads * d), 1), jobs = ceil_div(B * S, rows);
  for_each_job(jobs, useful_threads(threads, jobs), nullptr, 0, [&](int64_t job, float*) {
    for (int64_t row = job * rows; row < smaller(B * S, (job + 1) * rows); ++row) run(args, row);
  });
  return 0;
}

INSVP_FAST_STEP(rotate)
