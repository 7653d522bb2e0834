#define INSVP_FAST_WIDTH 8
#include "superpose_kernel.h"

const SuperposeKernels insvp_fast::superpose_avx2 = {superpose_fwd_tile, superpose_bwd_tile};
