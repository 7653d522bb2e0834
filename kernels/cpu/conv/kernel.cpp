// The arithmetic of the convolutions on one job.
#include "bwd_pool.h"
#include "bwd_weights_tiles.h"
#include "conv.h"
#include "fwd.h"
#include "fwd_tiles.h"

namespace {

void conv_fwd_job(const ConvFwd& a, int64_t job, float* scratch) {
  if (!a.tiles.pairs || !conv_fwd_in_tiles(a, job, scratch)) conv_fwd_in_vectors<kRounded>(a, job, scratch);
}

void conv_bwd_weights_job(const ConvBwdWeights& a, int64_t job, float* scratch, float* dw, float* db) {
  if (a.rounded != Rounded::tiles || !conv_bwd_weights_in_tiles(a, job, scratch, dw, db))
    conv_bwd_weights_in_vectors<kRounded>(a, job, scratch, dw, db);
}

}  // namespace

template <>
const ConvKernels& insvp_fast::kernels_for<ConvKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr ConvKernels kernels{kWidth, kChannels, kRounded, conv_fwd_job, conv_bwd_weights_job,
                                       conv_pool_bwd_weights_job, conv_pool_bwd_input_job};
  return kernels;
}
