// weighted_sum: w_a * a + w_b * b, for each image. Each product is rounded to the dtype of what was multiplied, as in
// PyTorch. The C function and the threads are here, the arithmetic is in kernel.cpp.
#include "weighted_sum.h"

#include "common/host.h"
#include "common/step.h"

using namespace insvp_fast;

// For B images of n numbers; see weighted_sum.h. A null pointer is an absent tensor.
INSVP_FAST_API int weighted_sum(
    void* to, int to_type, int64_t to_stride, void* a, int a_type, int64_t a_stride, float a_weight, void* b,
    int b_type, int64_t b_stride, float b_weight, int64_t B, int64_t n, int threads) {
  constexpr int64_t size = 1 << 14;  // numbers of a job
  const auto run = best_kernels<WeightedSumKernels>(isa()).run;
  const WeightedSum args{{{to, DType(to_type)}, to_stride, 1.0f},
                         {{a, DType(a_type)}, a_stride, a_weight},
                         {{b, DType(b_type)}, b_stride, b_weight}};
  const int64_t parts = ceil_div(n, size);
  for_each_job(B * parts, useful_threads(threads, B * parts), nullptr, 0, [&](int64_t job, float*) {
    const int64_t first = job % parts * size;
    run(args, job / parts, first, smaller(n, first + size));
  });
  return 0;
}

INSVP_FAST_STEP(weighted_sum)
