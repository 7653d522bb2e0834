#define INSVP_FAST_WIDTH 16
#include "attention_kernel.h"

const AttentionKernels insvp_fast::attention_avx512 = {attention_fwd_head<Floats>, attention_bwd_head<Floats>};
