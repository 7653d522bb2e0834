// The types of the C interface.
//
// Most headers here are included by files that are compiled for different instruction sets. The linker must not merge a
// function of one with that of another, so these headers use no STL and put every function into an unnamed namespace,
// or have it inlined always.
#pragma once
#include <cstdint>

#define INSVP_FAST_API extern "C" __attribute__((visibility("default")))

namespace insvp_fast {

// The codes are part of the C ABI.
enum class DType : int { f32 = 0, bf16 = 1 };
enum class Activation : int { gelu, gelu_tanh, quick_gelu, silu };

struct Array {
  void* data;  // null: absent
  DType type;
};

namespace {
constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }  // in bytes
}  // namespace

}  // namespace insvp_fast
