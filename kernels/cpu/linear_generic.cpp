#define INSVP_FAST_WIDTH 4
#include "linear_kernel.h"

const LinearKernels insvp_fast::linear_generic = {kRows, kColumns, kFactors, linear_block};
