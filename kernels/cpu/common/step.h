// Functions as steps of a program: each argument in a slot of 64 bits, but for the last one, the number of threads.
#pragma once
#include <cstdint>
#include <utility>

#include "common/abi.h"

namespace insvp_fast {
namespace {

struct Slot {
  uint64_t bits;

  // A number that is shorter is in the low bits.
  template <class T>
  operator T() const {
    static_assert(sizeof(T) <= sizeof bits && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    T value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <class... Args, std::size_t... I>
inline int call(int (*function)(Args...), const Slot* slots, int threads, std::index_sequence<I...>) {
  return function(slots[I]..., threads);
}

template <class... Args>
inline int call(int (*function)(Args...), const Slot* slots, int threads) {
  return call(function, slots, threads, std::make_index_sequence<sizeof...(Args) - 1>());
}

}  // namespace
}  // namespace insvp_fast

// Makes the function `name` a step as well.
#define INSVP_FAST_STEP(name)                                                  \
  INSVP_FAST_API int name##_step(const insvp_fast::Slot* slots, int threads) { \
    return insvp_fast::call(name, slots, threads);                             \
  }
