// The size of a tile of sums and of a block of tiles, and what a word of x or w is.
#pragma once
#include "common/sizes.h"
#include "common/vec.h"
#include "linear.h"
#ifdef INSVP_FAST_AMX
#include "common/amx.h"
#endif

namespace {

#ifdef INSVP_FAST_BF16_PAIRS
constexpr int kFactors = 2;
typedef bf16 factor;
typedef uint32_t word;
#else
constexpr int kFactors = 1;
typedef float factor;
typedef float word;
#endif

#ifdef INSVP_FAST_AMX
constexpr int kRows = 2 * kTile, kVectors = 2, kStep = kTile;
// Tiles are multiplied so fast that what is read more than once from behind the second-level cache costs more than
// waiting for the last thread: few blocks, of many rows. A run of a panel is half of the first-level cache.
constexpr int kBlocks = 1, kMostRows = 288, kDepth = 192;
constexpr bool kPastCaches = true;
#else
// The sums of a tile, the words of one row of a panel and one word of x fill the 16 registers, or the 32 of AVX-512.
// With 16, a tile of 4 rows and 3 vectors takes fewer instructions than one of 6 by 2.
constexpr int kRows = kWidth == 16 ? 8 : 4, kVectors = 3, kStep = 1;
// With more rows, too little of K fits into the second-level cache; longer runs of a panel leave no room in a first one
// of 32 KB.
constexpr int kBlocks = 2, kMostRows = 160, kDepth = 128;
constexpr bool kPastCaches = false;
#endif

constexpr int kColumns = kVectors * kWidth;
constexpr int64_t kRowStride = insvp_fast::run_stride(kDepth);

}  // namespace
