#define INSVP_FAST_WIDTH 4
#include "conv_kernel.h"

const ConvKernels insvp_fast::conv_generic = kKernels;
