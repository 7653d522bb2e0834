// The arithmetic of linear on one block of y.
#include "linear.h"
#ifdef INSVP_FAST_AMX
#include "matrix_block.h"
#else
#include "vector_block.h"
#endif

template <>
const LinearKernels& insvp_fast::kernels_for<LinearKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr LinearKernels kernels{kRows,   kColumns,  kFactors,    kDepth,      kStep,
                                         kBlocks, kMostRows, kPastCaches, linear_block};
  return kernels;
}
