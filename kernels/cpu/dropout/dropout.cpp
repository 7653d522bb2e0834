// dropout: the mask, the numbers and the generator's state of PyTorch, bit for bit; but NaN has any bits.
// The C functions and the threads are here, the arithmetic is in kernel.cpp.
#include "dropout.h"

#include "common/host.h"

namespace insvp_fast {
namespace {

const DropoutKernels& kernels() { return best_kernels<DropoutKernels>(isa()); }

// Calls run(first, last) for a share of n elements in each thread.
template <class Run>
void for_each_share(int64_t n, int threads, const Run& run) {
  constexpr int64_t smallest = 1 << 13;
  const int shares = useful_threads(threads, n / smallest);
  for_each_job(shares, shares, nullptr, 0, [&](int64_t i, float*) { run(i * n / shares, (i + 1) * n / shares); });
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both compute n elements of one type, and return 0. See dropout.h; null x and y are absent, and the generators may not
// be the same memory.

INSVP_FAST_API int dropout_fwd(void* x, void* y, int type, uint8_t* kept, const void* from, void* to, int64_t n,
                               uint64_t below, float scale, int threads) {
  const Dropout args{{x, DType(type)}, {y, DType(type)}, kept, scale};
  const auto draw = kernels().draw;
  // each thread steps through the words of those before it: a step is cheap, and no word depends on the threads
  for_each_share(n, threads, [&](int64_t first, int64_t last) {
    draw(args, first, last, below, *static_cast<const Generator*>(from),
         last == n ? static_cast<Generator*>(to) : nullptr);
  });
  return 0;
}

INSVP_FAST_API int dropout_bwd(void* grad, void* d_x, int type, uint8_t* kept, int64_t n, float scale, int threads) {
  const Dropout args{{grad, DType(type)}, {d_x, DType(type)}, kept, scale};
  const auto apply = kernels().apply;
  for_each_share(n, threads, [&](int64_t first, int64_t last) { apply(args, first, last); });
  return 0;
}
