// What the files with the C functions share: the choice of kernels, memory, threads. Kernels do not include it.
#pragma once
#include <cstdlib>

#include "common/abi.h"
#include "common/isa.h"
#include "common/sizes.h"
#include "common/threads.h"

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
