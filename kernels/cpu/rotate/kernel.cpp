// The arithmetic of rotate on a row.
#include "common/array.h"
#include "rotate.h"

namespace {

using namespace insvp_fast;

typedef uint64_t pairs __attribute__((vector_size(4 * kWidth)));

// Each even element in the place of the next, and the other way round.
inline vec exchanged(vec v) { return (vec)((pairs)v << 32 | (pairs)v >> 32); }

// Features 2 * i and 2 * i + 1 of a head are a pair.
void turn_neighbors(const Rotate& r, int64_t at, const float* sines) {
  vec sign;  // of the sine that a feature's partner is multiplied by; backward, the partner's sine
  for (int i = 0; i < kWidth; ++i) sign[i] = (i % 2 == 0) == r.forward ? -1.0f : 1.0f;
  for (int64_t i = 0; i < r.d; i += kWidth) {
    const int64_t n = r.d - i;
    const vec x = read(r.from, at + i, n), sine = load_some(sines + i, n);
    const vec partner = r.forward ? exchanged(x) * sine : exchanged(x * sine);
    write(r.to, at + i, x * load_some(sines + r.d + i, n) + sign * partner, n);
  }
}

// Features i and i + d / 2 are one.
void turn_halves(const Rotate& r, int64_t at, const float* sines) {
  const int64_t half = r.d / 2;
  for (int64_t i = 0; i < half; i += kWidth) {
    const int64_t n = half - i;
    const vec a = read(r.from, at + i, n), b = read(r.from, at + half + i, n);
    const vec sine_a = load_some(sines + i, n), sine_b = load_some(sines + half + i, n);
    const vec a_turned = a * load_some(sines + r.d + i, n), b_turned = b * load_some(sines + r.d + half + i, n);
    write(r.to, at + i, r.forward ? a_turned - b * sine_a : a_turned + b * sine_b, n);
    write(r.to, at + half + i, r.forward ? b_turned + a * sine_b : b_turned - a * sine_a, n);
  }
}

void run(const Rotate& r, int64_t row) {
  const int64_t width = r.heads * r.d, turned = r.parts * width, at = row * (turned + width);
  const int64_t token = row % r.S - r.first, size = size_of(r.from.type);
  const bool turns = token >= 0 && token < r.N;
  const int64_t kept = turns ? turned : 0;  // all from here on stays
  const auto bytes = [&](Array a) { return static_cast<char*>(a.data) + (at + kept) * size; };
  __builtin_memcpy(bytes(r.to), bytes(r.from), (turned + width - kept) * size);
  if (!turns) return;
  for (int64_t head = 0; head < r.parts * r.heads; ++head) {
    const float* sines = r.rotation + head % r.heads * r.head_stride + token * 2 * r.d;
    (r.half ? turn_halves : turn_neighbors)(r, at + head * r.d, sines);
  }
}

}  // namespace

template <>
const RotateKernels& insvp_fast::kernels_for<RotateKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr RotateKernels kernels{run};
  return kernels;
}
