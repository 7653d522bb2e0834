// What the files with the C functions share: the choice of kernels, threads, memory. Kernels do not include it.
#pragma once
#include <atomic>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/abi.h"
#include "common/isa.h"
#include "common/sizes.h"

namespace {

using namespace insvp_fast;

// The kernels of the best instruction set up to `level`. The build defines INSVP_FAST_LAST_ISA: the last instruction
// set for which the operation of this file has kernels.
template <class Kernels, Isa candidate = Isa::INSVP_FAST_LAST_ISA>
const Kernels& best_kernels(Isa level) {
  if constexpr (candidate > Isa::generic)
    if (level < candidate) return best_kernels<Kernels, Isa(static_cast<int>(candidate) - 1)>(level);
  return kernels_for<Kernels, candidate>();
}

inline int thread_id() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// As many threads as there are jobs for, but one at least.
inline int useful_threads(int threads, int64_t jobs) { return static_cast<int>(larger(1, smaller(threads, jobs))); }

// Calls run(job, scratch) for each job; each thread has a part of `scratch_size` floats of `scratch`. A thread begins
// with a share of its own: of several images, those that were its own in other operations, as its cache may still hold
// some of what it has written. Then it takes what others have not begun.
template <class Run>
void for_each_job(int64_t jobs, [[maybe_unused]] int threads, float* scratch, [[maybe_unused]] int64_t scratch_size,
                  const Run& run) {
#ifdef _OPENMP
  constexpr int kMostShares = 64;  // more threads than that begin together with others: the stack is small
  const int count = static_cast<int>(smaller(threads, kMostShares));
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  } shares[kMostShares];
  for (int i = 0; i < count; ++i) shares[i].next = i * jobs / count, shares[i].end = (i + 1) * jobs / count;
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_id();
    for (int i = 0; i < count; ++i) {
      Share& share = shares[(thread + i) % count];
      for (int64_t job; (job = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        run(job, scratch + thread * scratch_size);
    }
  }
#else
  for (int64_t job = 0; job < jobs; ++job) run(job, scratch);
#endif
}

// Adds `count` arrays of `size` floats, which follow one another, up in the first one. The order of the additions does
// not depend on the number of threads.
inline void sum_arrays(float* arrays, int64_t count, int64_t size, [[maybe_unused]] int threads) {
  constexpr int64_t step = 1024;
#pragma omp parallel for num_threads(threads)
  for (int64_t from = 0; from < size; from += step)
    for (int64_t n = 1; n < count; ++n)
      for (int64_t i = from; i < smaller(size, from + step); ++i) arrays[i] += arrays[n * size + i];
}

// Aligned memory, handed out piece by piece. Pieces of whole cache lines stay aligned. `base` is null where there is no
// memory. It is of whole lines, as systems other than Linux refuse other multiples of the alignment.
struct Workspace {
  float *base, *next;
  explicit Workspace(int64_t floats)
      : base(static_cast<float*>(std::aligned_alloc(64, whole_lines(larger(floats, 1)) * sizeof(float)))),
        next(base) {}
  ~Workspace() { std::free(base); }
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
};

}  // namespace
