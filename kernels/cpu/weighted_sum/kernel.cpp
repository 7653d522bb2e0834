// The arithmetic of weighted_sum on a part of an image. The build lets no product and sum become one rounding here.
#include "common/array.h"
#include "weighted_sum.h"

namespace {

using namespace insvp_fast;

// `n` numbers of a term, rounded to its dtype.
inline vec product(const Term& term, int64_t image, int64_t i, int64_t n) {
  const vec v = term.weight * read(term.array, image * term.stride + i, n);
  return term.array.type == DType::f32 ? v : rounded(v);
}

void run(const WeightedSum& s, int64_t image, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kWidth) {
    vec sum = product(s.a, image, i, last - i);
    if (s.b.array.data) sum += product(s.b, image, i, last - i);
    write(s.to.array, image * s.to.stride + i, sum, last - i);
  }
}

}  // namespace

template <>
const WeightedSumKernels& insvp_fast::kernels_for<WeightedSumKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr WeightedSumKernels kernels{run};
  return kernels;
}
