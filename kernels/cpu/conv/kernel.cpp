// The arithmetic of the convolutions on one job.
#include "bwd_pool.h"
#include "bwd_weights.h"
#include "conv.h"
#include "fwd.h"

template <>
const ConvKernels& insvp_fast::kernels_for<ConvKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr ConvKernels kernels{kWidth, kChannels, conv_fwd_job, conv_bwd_weights_job,
                                       conv_pool_bwd_weights_job, conv_pool_bwd_input_job};
  return kernels;
}
