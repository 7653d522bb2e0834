#define INSVP_FAST_WIDTH 16
#include "superpose_kernel.h"

const SuperposeKernels insvp_fast::superpose_avx512 = {superpose_fwd_tile, superpose_bwd_tile};
