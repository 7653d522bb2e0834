#define INSVP_FAST_WIDTH 8
#include "norm_insert_kernel.h"

const NormInsertKernels insvp_fast::norm_insert_avx2 = {norm_insert_fwd_rows, norm_insert_bwd_rows};
