// fingerprint: checksums of memory that is not supposed to change, and checks whether it still has them.
//
// Memory is divided into blocks of 128 cache lines, and line l of all blocks together has one checksum. A check of one
// l reads a 128th of the memory and still notices a write of a whole block or more. A checksum is the sum of the line's
// words, each mixed with its place: threads may add in any order, a change of a single word always changes the sum, and
// changes of many words, such as all signs, do not cancel.
#include <cstring>

#include "common/abi.h"
#include "common/sizes.h"

namespace {

constexpr int64_t kWordBytes = 8, kLineBytes = 64, kLines = 128, kBlockBytes = kLineBytes * kLines;
constexpr int64_t kSmall = 8 * kBlockBytes;  // bytes: regions up to this size are read in full
constexpr int64_t kShared = 1 << 20;         // bytes: threads share the lines of larger regions
constexpr int64_t kAhead = 16;               // blocks: how far ahead of its use a line is prefetched

inline uint64_t mixed(const char* data, int64_t at, int64_t size) {
  uint64_t word = 0;
  std::memcpy(&word, data + at, size);
  word += uint64_t(at) * 0x9E3779B97F4A7C15;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;  // the finalizer of SplitMix64, which is invertible
  word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
  return word ^ (word >> 31);
}

// The sum of the line that starts at byte `at`, up to the end of the data.
inline uint64_t line_sum(const char* data, int64_t bytes, int64_t at) {
  uint64_t sum = 0;
  if (at + kLineBytes <= bytes) {
    for (int64_t k = 0; k < kLineBytes; k += kWordBytes) sum += mixed(data, at + k, kWordBytes);
    return sum;
  }
  for (; at < bytes; at += kWordBytes) sum += mixed(data, at, smaller(kWordBytes, bytes - at));
  return sum;
}

struct Region {  // a row of the table in insvp_fast/runtime/native/fingerprint.py
  const char* data;
  int64_t bytes;
  const uint64_t* sums;  // [128], of each line
  int64_t line;          // to check
};

// The sum of line `line` of the blocks from `first` to before `last`.
uint64_t sum_of_blocks(const Region& r, int64_t line, int64_t first, int64_t last) {
  uint64_t sum = 0;
  for (int64_t block = first; block < last; ++block) {
    const int64_t at = block * kBlockBytes + line * kLineBytes;
    __builtin_prefetch(r.data + smaller(at + kAhead * kBlockBytes, r.bytes - 1));
    sum += line_sum(r.data, r.bytes, at);
  }
  return sum;
}

bool same(const Region& r, int64_t line, [[maybe_unused]] int threads) {
  const int64_t blocks = ceil_div(r.bytes - line * kLineBytes, kBlockBytes), parts = r.bytes > kShared ? threads : 1;
  if (parts == 1) return sum_of_blocks(r, line, 0, blocks) == r.sums[line];
  uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) num_threads(threads)
  for (int64_t i = 0; i < parts; ++i) sum += sum_of_blocks(r, line, blocks * i / parts, blocks * (i + 1) / parts);
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
    for (int64_t block = 0; block < ceil_div(bytes, kBlockBytes); ++block)
      for (int64_t line = 0; line < kLines; ++line)
        own[line] += line_sum(data, bytes, block * kBlockBytes + line * kLineBytes);
#pragma omp critical
    for (int64_t line = 0; line < kLines; ++line) sums[line] += own[line];
  }
  return 0;
}

// Whether each region still has the checksum of its line, into *result; small regions are checked in full. Each line is
// in a page of its own: the search for the pages takes most of the time.
INSVP_FAST_API int fingerprint_same(const Region* regions, int64_t count, int* result, int threads) {
  bool all = true;
  for (const Region* r = regions; r < regions + count; ++r) {
    const bool small = r->bytes <= kSmall;
    for (int64_t l = small ? 0 : r->line; l < (small ? kLines : r->line + 1); ++l) all = all && same(*r, l, threads);
  }
  *result = all;
  return 0;
}
