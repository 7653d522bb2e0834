// The register tile of the convolutions.
#pragma once
#include "common/vec.h"

namespace {

// A tile has M channels and as many vectors as leave room in the registers for its sums, its inputs and one weight. One
// register stays free: without it gcc keeps sums in memory.
constexpr int kRegisters = kWidth == 16 ? 32 : 16, kChannels = kWidth == 16 ? 9 : 4;
constexpr int across(int channels) {
  return (kRegisters - 2) / (channels + 1) < 8 ? (kRegisters - 2) / (channels + 1) : 8;
}

}  // namespace
