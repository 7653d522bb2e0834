// fingerprint: checksums of memory that is not supposed to change, and checks whether it still has them.
//
// Memory is divided into blocks of 128 cache lines, and line l of all blocks together has one checksum. A check of one
// l reads a 128th of the memory and still notices a write of a whole block or more. A checksum is the sum of lines,
// each a sum of words times factors of their own, mixed with the line's place: threads may add in any order, a change
// of a single word always changes the sum, and changes of many words, such as all signs, do not cancel.
#include <cstdlib>
#include <cstring>

#include "common/abi.h"
#include "common/sizes.h"

namespace {

constexpr int64_t kWordBytes = 8, kLineBytes = 64, kLines = 128, kBlockBytes = kLineBytes * kLines;
constexpr int64_t kWords = kLineBytes / kWordBytes;
constexpr int64_t kSmall = 8 * kBlockBytes;  // bytes: regions up to this size are read in full
[[maybe_unused]] constexpr int64_t kShared = 128;  // blocks: threads share more
constexpr int64_t kAhead = 16;               // blocks: how far ahead of its use a line is prefetched

// The finalizer of SplitMix64, which is invertible.
constexpr uint64_t mixed(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
  return word ^ (word >> 31);
}

constexpr uint64_t factor(uint64_t k) { return mixed(k) | 1; }  // odd: no change of a word is lost

template <int64_t K>
inline uint64_t sum_of_words(const char* data, int64_t bytes) {
  if constexpr (K == kWords) return 0;
  else {
    uint64_t word = 0;
    if (bytes > 0) std::memcpy(&word, data, smaller(kWordBytes, bytes));
    constexpr uint64_t own = factor(K + 1);
    // a product leaves the highest bit where it is, so the signs of several words would cancel
    return (word ^ (word >> 29)) * own + sum_of_words<K + 1>(data + kWordBytes, bytes - kWordBytes);
  }
}

// The sum of the line that starts at byte `at`, up to the end of the data.
inline uint64_t line_sum(const char* data, int64_t bytes, int64_t at) {
  const int64_t left = bytes - at;
  const uint64_t sum = left < kLineBytes ? sum_of_words<0>(data + at, left) : sum_of_words<0>(data + at, kLineBytes);
  return left > 0 ? mixed(sum + uint64_t(at) * 0x9E3779B97F4A7C15) : 0;
}

struct Region {  // a row of the table in insvp_fast/runtime/native/fingerprint.py
  const char* data;
  int64_t bytes;
  const uint64_t* sums;  // [128], of each line
  int64_t line;          // to check

  bool small() const { return bytes <= kSmall; }
  int64_t first() const { return small() ? 0 : line; }
  int64_t last() const { return small() ? kLines : line + 1; }
  uint64_t expected() const {
    uint64_t sum = 0;
    for (int64_t l = first(); l < last(); ++l) sum += sums[l];
    return sum;
  }
};

// The sum over the lines to check of the blocks of one of several parts.
uint64_t sum_of_part(const Region& r, int64_t part, int64_t parts) {
  const int64_t blocks = ceil_div(r.bytes, kBlockBytes), first = blocks * part / parts;
  uint64_t sum = 0;
  for (int64_t block = first; block < blocks * (part + 1) / parts; ++block)
    for (int64_t line = r.first(); line < r.last(); ++line) {
      const int64_t at = block * kBlockBytes + line * kLineBytes;
      if (!r.small()) __builtin_prefetch(r.data + smaller(at + kAhead * kBlockBytes, r.bytes - 1));
      sum += line_sum(r.data, r.bytes, at);
    }
  return sum;
}

}  // namespace

// The checksum of every line, into sums[128].
INSVP_FAST_API int fingerprint(const char* data, int64_t bytes, uint64_t* sums,
                               [[maybe_unused]] int threads) {
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
// in a page of its own: waiting for these takes most of the time. Returns 0, or -1 if there is no memory.
INSVP_FAST_API int fingerprint_same(const Region* regions, int64_t count, int* result, int threads) {
  struct Check {
    Region region;  // a copy: another thread may look at the same regions, but at other lines
    uint64_t sum;
  };
  Check* checks = static_cast<Check*>(std::malloc(larger(1, count) * sizeof(Check)));
  if (!checks) return -1;
  [[maybe_unused]] int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    checks[i] = {regions[i], 0};
    blocks += ceil_div(regions[i].bytes, kBlockBytes);
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (blocks > kShared)
  for (int64_t job = 0; job < count * threads; ++job) {
    Check& check = checks[job / threads];
    const uint64_t sum = sum_of_part(check.region, job % threads, threads);
#pragma omp atomic
    check.sum += sum;
  }
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all = all && checks[i].sum == checks[i].region.expected();
  std::free(checks);
  *result = all;
  return 0;
}
