// The interface between dropout.cpp and kernel.cpp.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

constexpr int64_t kStateWords = 624;

// PyTorch's generator of random numbers on CPUs, a Mersenne Twister (MT19937), as torch.Generator.get_state returns it.
// It has drawn 625 - left of its words; with one left, the next word is the first of a new state.
struct Generator {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next, words[kStateWords];
  // numbers of other distributions follow
};
static_assert(sizeof(Generator) == 5016);  // STATE_BYTES in insvp_fast/runtime/native/dropout.py

// y = x * scale where an element is kept, else x * 0.
struct Dropout {
  Array x, y;     // null where only the mask is drawn
  uint8_t* kept;  // 1 or 0 for each element: written by draw, read by apply
  float scale;
};

struct DropoutKernels {
  // Both compute the elements first <= i < last.
  void (*apply)(const Dropout&, int64_t first, int64_t last);
  // Keeps an element if 53 random bits are below `below`. `from` is the generator before the first of all elements,
  // which takes two words for each; `to`, if not null, becomes that after the last of these.
  void (*draw)(const Dropout&, int64_t first, int64_t last, uint64_t below, const Generator& from, Generator* to);
};

}  // namespace insvp_fast
