#define INSVP_FAST_WIDTH 4
#include "superpose_kernel.h"

const SuperposeKernels insvp_fast::superpose_generic = {superpose_fwd_tile, superpose_bwd_tile};
