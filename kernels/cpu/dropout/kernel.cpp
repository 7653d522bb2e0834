// The random numbers of a share of the elements, and what becomes of the elements.
#include "common/array.h"
#include "common/sizes.h"
#include "dropout.h"

namespace {

using namespace insvp_fast;

constexpr int64_t kChunk = 512;  // elements whose random words are in the first cache level

// M. Matsumoto and T. Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998): word i + 624 comes from those at i, i + 1 and
// i + 397, so that a vector of them can be made at once.
class Twister {
 public:
  explicit Twister(const Generator& from) : next_(from.left == 1 ? kStateWords : static_cast<int64_t>(from.next)) {
    for (int64_t i = 0; i < kStateWords; ++i) state()[i] = static_cast<uint32_t>(from.words[i]);
  }

  void skip(int64_t count) {
    for (next_ += count; next_ > kStateWords; next_ -= kStateWords) renew();
  }

  // Draws words; up to a vector more are written behind them.
  void draw(uint32_t* to, int64_t count) {
    while (count) {
      if (next_ == kStateWords) renew(), next_ = 0;
      const int64_t n = smaller(kStateWords - next_, count);
      for (int64_t i = 0; i < n; i += kWidth) store(to + i, tempered(load(state() + next_ + i)));
      next_ += n, to += n, count -= n;
    }
  }

  void write(Generator* to) const {
    to->next = next_;
    to->left = static_cast<int32_t>(kStateWords + 1 - next_);
    for (int64_t i = 0; i < kStateWords; ++i) to->words[i] = words_[kStateWords + i];
  }

 private:
  static bits32 load(const uint32_t* from) {
    bits32 v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  static void store(uint32_t* to, bits32 v) { __builtin_memcpy(to, &v, sizeof v); }

  static bits32 tempered(bits32 x) {
    x ^= x >> 11;
    x ^= x << 7 & 0x9d2c5680u;
    x ^= x << 15 & 0xefc60000u;
    return x ^ x >> 18;
  }

  uint32_t* state() { return words_ + kStateWords; }

  void renew() {
    __builtin_memcpy(words_, state(), kStateWords * sizeof(uint32_t));
    for (int64_t i = 0; i < kStateWords; i += kWidth) {
      const bits32 here = load(words_ + i), after = load(words_ + i + 1);
      const bits32 mixed = (here & 0x80000000u) | (after & 0x7fffffffu);
      store(state() + i, load(words_ + i + 397) ^ mixed >> 1 ^ (-(after & 1u) & 0x9908b0dfu));
    }
  }

  uint32_t words_[2 * kStateWords + kWidth] = {};  // the last state, then this one, then what a vector reads beyond it
  int64_t next_;
};

void apply_chunk(const Dropout& a, int64_t first, int64_t n, const uint8_t* kept) {
  typedef uint8_t bytes __attribute__((vector_size(kWidth)));
  for (int64_t i = 0; i < n; i += kWidth) {
    bytes keep;
    __builtin_memcpy(&keep, kept + i, sizeof keep);
    const vec factor = a.scale * __builtin_convertvector(keep, vec);
    write(a.y, first + i, factor * read(a.x, first + i, n - i), n - i);
  }
}

void apply(const Dropout& a, int64_t first, int64_t last) {
  uint8_t kept[kChunk];
  for (int64_t n; first < last; first += n) {
    n = smaller(kChunk, last - first);
    __builtin_memcpy(kept, a.kept + first, n);
    apply_chunk(a, first, n, kept);
  }
}

void draw(const Dropout& a, int64_t first, int64_t last, uint64_t below, const Generator& from, Generator* to) {
  typedef uint64_t bits64 __attribute__((vector_size(4 * kWidth)));
  typedef int8_t bytes __attribute__((vector_size(kWidth / 2)));
  alignas(64) uint32_t words[2 * kChunk + kWidth];
  uint8_t kept[kChunk];
  Twister twister(from);
  twister.skip(2 * first);
  for (int64_t n; first < last; first += n) {
    n = smaller(kChunk, last - first);
    twister.draw(words, 2 * n);
    for (int64_t i = 0; i < n; i += kWidth / 2) {
      bits64 pair;  // of which the first word has the higher bits
      __builtin_memcpy(&pair, words + 2 * i, sizeof pair);
      const bits64 number = (pair << 32 | pair >> 32) & ((uint64_t{1} << 53) - 1);
      const bytes keep = __builtin_convertvector(number < below, bytes) & 1;
      __builtin_memcpy(kept + i, &keep, sizeof keep);
    }
    __builtin_memcpy(a.kept + first, kept, n);
    if (a.y.data) apply_chunk(a, first, n, kept);
  }
  if (to) twister.write(to);
}

}  // namespace

template <>
const DropoutKernels& insvp_fast::kernels_for<DropoutKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr DropoutKernels kernels{apply, draw};
  return kernels;
}
