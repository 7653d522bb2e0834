// Work for several threads.
#pragma once
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/sizes.h"
#include "common/team.h"

namespace {

using namespace insvp_fast;

// As many threads as there are jobs for, but one at least.
inline int useful_threads(int threads, int64_t jobs) { return static_cast<int>(larger(1, smaller(threads, jobs))); }

// Calls run(job, scratch) for each job; each thread has a part of `scratch_size` floats of `scratch`. A thread begins
// with a share of its own. With several images these are the same ones in each operation, so that its cache may still
// hold what it has written. Then it takes jobs that others have not begun.
template <class Run>
void for_each_job(int64_t jobs, [[maybe_unused]] int threads, float* scratch, [[maybe_unused]] int64_t scratch_size,
                  const Run& run) {
#ifdef _OPENMP
  if (threads > 1 && jobs > 1) {
    constexpr int kMostShares = 64;  // more threads than that begin together with others: the stack is small
    const int count = static_cast<int>(smaller(threads, kMostShares));
    struct alignas(64) Share {
      std::atomic<int64_t> next;
      int64_t end;
    } shares[kMostShares];
    for (int i = 0; i < count; ++i) shares[i].next = i * jobs / count, shares[i].end = (i + 1) * jobs / count;
    const auto work = [&](int thread) {
      for (int i = 0; i < count; ++i) {
        Share& share = shares[(thread + i) % count];
        for (int64_t job; (job = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
          run(job, scratch + thread * scratch_size);
      }
    };
    if (Team* team = Team::current()) return team->run(threads, work);
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
    return;
  }
#endif
  for (int64_t job = 0; job < jobs; ++job) run(job, scratch);
}

// Adds `count` arrays of `size` floats, which follow one another, up in the first one. The order of the additions does
// not depend on the number of threads.
inline void sum_arrays(float* arrays, int64_t count, int64_t size, int threads) {
  constexpr int64_t step = 1024;
  for_each_job(ceil_div(size, step), threads, nullptr, 0, [&](int64_t job, float*) {
    for (int64_t n = 1; n < count; ++n)
      for (int64_t i = job * step; i < smaller(size, (job + 1) * step); ++i) arrays[i] += arrays[n * size + i];
  });
}

}  // namespace
