#define INSVP_FAST_WIDTH 8
#include "linear_kernel.h"

const LinearKernels insvp_fast::linear_avx2 = {kRows, kColumns, kFactors, linear_block};
