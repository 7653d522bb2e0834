// The instruction sets that kernels are compiled for.
#pragma once

namespace insvp_fast {

enum class Isa : int { generic, avx2, avx512, avx512_bf16, amx };  // each includes those before it

// The instruction set in use, but none above `limit`: the best one of the processor, unless insvp_fast_select_isa
// lowered it.
Isa isa(Isa limit = Isa::amx);

// An operation's kernels for one instruction set. Its kernel.cpp is compiled once for each and defines this for
// INSVP_FAST_ISA. best_kernels in host.h chooses.
template <class Kernels, Isa isa>
const Kernels& kernels_for();

}  // namespace insvp_fast
