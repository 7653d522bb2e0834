#define INSVP_FAST_WIDTH 16
#include "conv_kernel.h"

const ConvKernels insvp_fast::conv_avx512 = kKernels;
