#define INSVP_FAST_WIDTH 8
#include "conv_kernel.h"

const ConvKernels insvp_fast::conv_avx2 = kKernels;
