#define INSVP_FAST_WIDTH 16
#include "linear_kernel.h"

const LinearKernels insvp_fast::linear_avx512 = {kRows, kColumns, kFactors, linear_block};
