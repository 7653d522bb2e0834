// What all operations of the CPU library share. Included by files with different instruction sets, so: no STL, and
// no function that the linker could merge across them.
#pragma once
#include <cstdint>

#define INSVP_FAST_API extern "C" __attribute__((visibility("default")))

namespace insvp_fast {

enum class Isa : int { generic, avx2, avx512, avx512_bf16 };  // each has what those before it have

// The level in use: the best one that the processor has, unless insvp_fast_select_isa lowered it.
Isa isa();

enum class DType : int { f32 = 0, bf16 = 1 };  // the codes are part of the C ABI

struct Array {
  void* data;  // null: absent
  DType type;
};

}  // namespace insvp_fast
