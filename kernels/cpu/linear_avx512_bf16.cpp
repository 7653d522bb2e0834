#define INSVP_FAST_WIDTH 16
#define INSVP_FAST_BF16_PAIRS
#include "linear_kernel.h"

const LinearKernels insvp_fast::linear_avx512_bf16 = {kRows, kColumns, kFactors, linear_block};
