#define INSVP_FAST_WIDTH 4
#include "attention_kernel.h"

const AttentionKernels insvp_fast::attention_generic = {attention_fwd_head<Floats>, attention_bwd_head<Floats>};
