// fingerprint: checksums of memory that is not supposed to change, and a look whether it still has them.
//
// Memory is seen as blocks of 128 cache lines. Line l of all blocks together has one checksum: a look at one line reads
// a 128th of the memory, and a write of a whole block or more does not escape it. A checksum is the sum of the line's
// words, each mixed with its place: threads may add in any order, a single word that changes always changes the sum, and
// changes of many, such as all signs, do not cancel.
#include <cstring>

#include "common.h"
#include "host.h"

namespace {

constexpr int64_t kWord = 8, kLine = 64, kLines = 128, kBlock = kLine * kLines;
constexpr int64_t kSmall = 8 * kBlock;  // bytes: up to here a look reads everything
constexpr int64_t kAhead = 16;          // blocks: how far ahead of its use a line is asked for

inline uint64_t mixed(const char* data, int64_t at, int64_t size) {
  uint64_t word = 0;
  std::memcpy(&word, data + at, size);
  word += uint64_t(at) * 0x9E3779B97F4A7C15;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;  // the finalizer of SplitMix64, which can be undone
  word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
  return word ^ (word >> 31);
}

// The line from byte `at` on, as far as it is there.
inline uint64_t line_sum(const char* data, int64_t bytes, int64_t at) {
  uint64_t sum = 0;
  if (at + kLine <= bytes) {
    for (int64_t k = 0; k < kLine; k += kWord) sum += mixed(data, at + k, kWord);
    return sum;
  }
  for (; at < bytes; at += kWord) sum += mixed(data, at, smaller(kWord, bytes - at));
  return sum;
}

struct Region {  // a row of the table in native/fingerprint.py
  const char* data;
  int64_t bytes;
  const uint64_t* sums;  // of each line
};

bool same(const Region& r, int64_t line) {
  uint64_t sum = 0;
  for (int64_t at = line * kLine; at < r.bytes; at += kBlock) {
    __builtin_prefetch(r.data + smaller(at + kAhead * kBlock, r.bytes - 1));
    sum += line_sum(r.data, r.bytes, at);
  }
  return sum == r.sums[line];
}

}  // namespace

// The checksum of every line, into sums[128].
INSVP_FAST_API int fingerprint(const char* data, int64_t bytes, uint64_t* sums, int threads) {
  std::memset(sums, 0, kLines * sizeof(uint64_t));
#pragma omp parallel num_threads(threads) if (bytes > kSmall)
  {
    uint64_t own[kLines] = {};
#pragma omp for
    for (int64_t block = 0; block < ceil_div(bytes, kBlock); ++block)
      for (int64_t line = 0; line < kLines; ++line)
        own[line] += line_sum(data, bytes, block * kBlock + line * kLine);
#pragma omp critical
    for (int64_t line = 0; line < kLines; ++line) sums[line] += own[line];
  }
  return 0;
}

// Whether each region still has the checksum of one line, into *result; small regions are read in full. One thread,
// whatever their number: a look at a large weight takes some 20 microseconds, of which waiting for others would be much.
INSVP_FAST_API int fingerprint_same(const Region* regions, int64_t count, int64_t line, int* result, int /*threads*/) {
  bool all = true;
  for (const Region* r = regions; r < regions + count; ++r) {
    const bool small = r->bytes <= kSmall;
    for (int64_t l = small ? 0 : line; l < (small ? kLines : line + 1); ++l) all = all && same(*r, l);
  }
  *result = all;
  return 0;
}
