// Convolutions with few channels and stride 1, of the center of a map; with max-pooling and LeakyReLU behind them.
// The C functions and the threads are here, the division into jobs is in layout.h, the arithmetic is in kernel.cpp.
#include "conv.h"

#include <cstring>

#include "common/bf16.h"
#include "common/step.h"
#include "layout.h"
#include "tiles.h"

namespace insvp_fast {
namespace {

ConvShape shape(int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t OH, int64_t OW, int64_t KH, int64_t KW,
                int64_t dilation, int64_t pool) {
  const int64_t top = (H - OH) / 2 - dilation * (KH - 1) / 2, left = (W - OW) / 2 - dilation * (KW - 1) / 2;
  return {B, C, H, W, O, OH, OW, KH, KW, dilation, pool, top, left};
}

// A weight rounded to bf16. If that is not finite, `finite` becomes false.
uint32_t rounded_weight(float weight, bool& finite) {
  bf16 number;
  narrow(number, weight);
  finite = finite && (number & 0x7f80) != 0x7f80;
  return number;
}

// Fills TileWeights with the weights element(o, tap). Returns whether all are finite when they are rounded.
template <class Element>
bool pack_for_tiles(const ConvFwd& a, const TileSizes& t, uint32_t* pairs, float* bias, const Element& element,
                    int threads) {
  constexpr int64_t T = kTileRows, K = kTileNumbers;
  const ConvShape& s = a.s;
  const int64_t row = t.chunks * t.columns * T;
  std::atomic<bool> all_finite{true};
  for (int64_t n = 0; n < t.columns; ++n) bias[n] = a.bias && n < t.across * s.O ? a.bias[n % s.O] : 0;
  for_each_job(s.KH, useful_threads(threads, s.KH), nullptr, 0, [&](int64_t i, float*) {
    uint32_t* to = pairs + i * row;
    bool finite = true;
    std::memset(to, 0, row * sizeof(uint32_t));
    for (int64_t o = 0; o < s.O; ++o)
      for (int64_t c = 0; c < s.C; ++c)
        for (int64_t j = 0; j < s.KW; ++j) {
          const uint32_t number = rounded_weight(element(o, (c * s.KH + i) * s.KW + j), finite);
          for (int64_t place = 0; place < t.across; ++place) {
            const int64_t k = (place + j * s.dilation) * s.C + c, n = place * s.O + o;
            const int64_t tile = k / K * (t.columns / T) + n / T;
            to[(tile * K / 2 + k % K / 2) * T + n % T] |= number << k % 2 * 16;
          }
        }
    if (!finite) all_finite = false;
  });
  return all_finite;
}

// Fills Taps with the weights element(o, tap).
template <class Element>
void pack(const ConvFwd& a, float* to, const Element& element) {
  const int64_t taps = a.s.taps();
  for (int64_t o = 0; o < a.s.O; ++o) {
    const int64_t first = o / a.block * a.block, channels = smaller(a.block, a.s.O - first);
    for (int64_t t = 0; t < taps; ++t) to[first * taps + t * channels + o - first] = element(o, t);
  }
}

// Fills Taps with pairs of the packed weights of every second channel and the next one. Returns whether all are finite
// when they are rounded.
bool pack_pairs(const ConvFwd& a, uint32_t* to, const float* w) {
  const ConvShape& s = a.s;
  bool finite = true;
  for (int64_t o = 0; o < s.O; o += a.block) {
    const int64_t n = s.KH * s.KW * smaller(a.block, s.O - o);  // weights of a channel in, of this block
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < n; ++i, ++w) {
        const uint32_t number = rounded_weight(*w, finite);
        if (c % 2 == 0) to[c / 2 * n + i] = number;
        else to[c / 2 * n + i] |= number << 16;
      }
    to += ceil_div(s.C, 2) * n;
  }
  return finite;
}

// y = the convolution of x with the weights element(o, tap). With `rounded`, operands may be rounded to bf16.
template <class Element>
int correlate(ConvFwd a, const Element& element, bool rounded, int threads) {
  const ConvShape& s = a.s;
  const int64_t taps = s.taps(), phases = s.pool * s.pool;
  a.block = block_of(s.O);
  Rounded by = rounded && rounding_pays(s) ? kernels().rounded : Rounded::none;
  if (by == Rounded::pairs && s.C == 1) by = Rounded::none;  // half of a pair would be zeros
  const bool tiles = by == Rounded::tiles, pairs = by == Rounded::pairs;
  // Where nothing is rounded no result depends on the size of its job. Else a job rounds none of its factors if one is
  // not finite, so that its size must not depend on the number of threads, but on the batch alone.
  const int64_t wanted = (by == Rounded::none ? threads : kJobs) / larger(1, s.B);
  a.l = layout(s, a.block * (s.pool > 1 ? 2 : 1), kernels().width, wanted);
  if (!has_places(s, a.l)) return -1;
  const int64_t jobs = s.B * a.l.bands, n = most_positions(s, a.l);
  const TileSizes sizes(s);
  const int64_t scratch_size = whole_lines(larger(
      tiles ? TileScratch(s, sizes, a.l.rows).all : 0,
      phases * s.C * a.l.plane + kSlack + 2 * a.block * a.l.out_plane + spare_floats(s, a.l)));
  const int64_t weights = whole_lines(s.O * taps), offsets = whole_lines(phases * taps);
  const int64_t rounded_weights = tiles ? sizes.columns + sizes.weights : pairs ? weights + offsets : 0;
  threads = useful_threads(threads, jobs);
  Workspace memory(weights + offsets + whole_lines(n) + rounded_weights + threads * scratch_size);
  if (!memory.base) return -1;
  float* w = memory.take(weights);
  int32_t *places = take_integers(memory, phases * taps), *positions = take_integers(memory, n);
  float* scratch = memory.take(threads * scratch_size);
  pack(a, w, element);
  list_offsets(places, s, a.l);
  list_positions(positions, s, a.l);
  a.taps = {w, places, taps};
  a.positions = positions;
  if (tiles) {
    float* bias = memory.take(rounded_weights);
    uint32_t* to = reinterpret_cast<uint32_t*>(bias + sizes.columns);
    if (pack_for_tiles(a, sizes, to, bias, element, threads)) a.tiles = {to, bias};
  }
  if (pairs) {
    uint32_t* to = reinterpret_cast<uint32_t*>(memory.take(weights));
    places = take_integers(memory, phases * taps);
    list_offsets(places, s, a.l, 2);
    if (pack_pairs(a, to, w)) a.pairs = {to, places, ceil_div(s.C, 2) * s.KH * s.KW};
  }
  const auto kernel = kernels().fwd;
  for_each_job(jobs, threads, scratch, scratch_size, [&](int64_t job, float* own) { kernel(a, job, own); });
  return 0;
}

// Calls run(job, scratch, sums) for each job, which adds to its `size` sums, and returns the sums of all jobs. They are
// added up in chunks of jobs that do not depend on the number of threads, and the chunks in their order, so that the
// result has the same bits for every number of threads. The memory is that of 64 chunks at most.
template <class Job>
float* sum_jobs(int64_t jobs, int64_t size, int64_t scratch_size, Workspace& memory, int threads, const Job& run) {
  const int64_t chunk = larger(1, ceil_div(jobs, 64)), chunks = larger(1, ceil_div(jobs, chunk));
  float *partials = memory.take(chunks * size), *scratch = memory.take(threads * scratch_size);
  for_each_job(chunks, threads, scratch, scratch_size, [&](int64_t c, float* own) {
    std::memset(partials + c * size, 0, size * sizeof(float));
    for (int64_t job = c * chunk; job < smaller(jobs, (c + 1) * chunk); ++job) run(job, own, partials + c * size);
  });
  sum_arrays(partials, chunks, size, threads);
  return partials;
}

// The memory that sum_jobs takes.
int64_t sum_jobs_floats(int64_t jobs, int64_t size, int64_t scratch_size, int threads) {
  return larger(1, smaller(jobs, 64)) * size + threads * scratch_size;
}

// d_x is a convolution of the gradient with the weights turned around.
int input_gradient(const ConvBwdWeights& a, Array d_x, const float* w, bool rounded, int threads) {
  const ConvShape& s = a.s;
  ConvFwd to{};
  to.s = {s.B, s.O, s.OH, s.OW, s.C, s.H, s.W, s.KH, s.KW, s.dilation, 1, -s.top - (s.KH - 1) * s.dilation,
          -s.left - (s.KW - 1) * s.dilation};
  to.x = a.grad;
  to.mask = a.mask;
  to.y = d_x;
  to.negative_slope = 1.0f;
  const int64_t window = s.KH * s.KW, C = s.C;
  const auto element = [=](int64_t c, int64_t t) { return w[(t / window * C + c) * window + window - 1 - t % window]; };
  return correlate(to, element, rounded, threads);
}

int weight_gradient(ConvBwdWeights a, float* dw, float* db, bool rounded, int threads) {
  const ConvShape& s = a.s;
  a.block = block_of(s.O);
  a.rounded = rounded && rounding_weights_pays(s) ? kernels().rounded : Rounded::none;
  a.l = layout(s, s.O, kernels().width * (a.rounded == Rounded::pairs ? 2 : 1));
  if (!has_places(s, a.l)) return -1;
  const int64_t taps = s.taps(), weights = s.O * taps, jobs = s.B * a.l.bands, n = most_positions(s, a.l);
  const int64_t size = whole_lines(weights + s.O);
  const int64_t scratch_size =
      whole_lines(larger(a.rounded == Rounded::tiles ? WeightTiles(s, a.l.rows).all : 0,
                         s.C * a.l.plane + kSlack + s.O * a.l.out_plane + spare_floats(s, a.l)));
  threads = useful_threads(threads, jobs);
  Workspace memory(whole_lines(taps) + whole_lines(n) + sum_jobs_floats(jobs, size, scratch_size, threads));
  if (!memory.base) return -1;
  int32_t *offsets = take_integers(memory, taps), *positions = take_integers(memory, n);
  list_offsets(offsets, s, a.l);
  list_positions(positions, s, a.l);
  a.offsets = offsets;
  a.positions = positions;
  const auto kernel = kernels().bwd_weights;
  const auto run = [&](int64_t job, float* own, float* sums) { kernel(a, job, own, sums, sums + weights); };
  const float* sums = sum_jobs(jobs, size, scratch_size, memory, threads, run);
  std::memcpy(dw, sums, weights * sizeof(float));
  std::memcpy(db, sums + weights, s.O * sizeof(float));
  return 0;
}

// Calls copy(i, j) for each element of w: i in [O, C, KH, KW], j in the packed form [O, KH, chunk].
template <class Copy>
void for_each_weight(const ConvPoolBwd& a, const Copy& copy) {
  const ConvShape& s = a.s;
  for (int64_t o = 0; o < s.O; ++o)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < s.KH; ++i)
        for (int64_t j = 0; j < s.KW; ++j)
          copy(((o * s.C + c) * s.KH + i) * s.KW + j, (o * s.KH + i) * a.chunk + j * s.C + c);
}

int64_t packed_floats(const ConvPoolBwd& a) { return a.s.O * a.s.KH * a.chunk; }

// Floats of a row of the map, channels last, and those that a job needs beside maps and gradients.
int64_t pool_row(const ConvShape& s) { return (s.OW + s.KW - 1) * s.C; }
int64_t pool_spare(const ConvShape& s) { return 2 * (s.W + s.OW) + s.KW + 2 * kSlack; }

int pool_input_gradient(ConvPoolBwd a, const float* w, int threads) {
  const ConvShape& s = a.s;
  const int64_t weights = packed_floats(a);
  const int64_t scratch_size =
      whole_lines((s.OH + s.KH - 1) * pool_row(s) + a.chunk + 2 * s.cols_out() + pool_spare(s));
  threads = useful_threads(threads, s.B);
  Workspace memory(weights + threads * scratch_size);
  if (!memory.base) return -1;
  float *packed = memory.take(weights), *scratch = memory.take(threads * scratch_size);
  std::memset(packed, 0, weights * sizeof(float));
  for_each_weight(a, [&](int64_t i, int64_t j) { packed[j] = w[i]; });
  a.w = packed;
  const auto kernel = kernels().pool_bwd_input;
  for_each_job(s.B, threads, scratch, scratch_size, [&](int64_t b, float* own) { kernel(a, b, own); });
  return 0;
}

int pool_weight_gradient(const ConvPoolBwd& a, float* dw, float* db, int threads) {
  const ConvShape& s = a.s;
  const int64_t weights = packed_floats(a), size = whole_lines(weights + s.O), jobs = s.B * a.bands;
  const int64_t scratch_size = whole_lines((a.rows * s.pool + s.KH - 1) * pool_row(s) + a.chunk +
                                           2 * a.rows * s.cols_out() + pool_spare(s));
  threads = useful_threads(threads, jobs);
  Workspace memory(sum_jobs_floats(jobs, size, scratch_size, threads));
  if (!memory.base) return -1;
  const auto kernel = kernels().pool_bwd_weights;
  const auto run = [&](int64_t job, float* own, float* sums) { kernel(a, job, own, sums, sums + weights); };
  const float* sums = sum_jobs(jobs, size, scratch_size, memory, threads, run);
  for_each_weight(a, [&](int64_t i, int64_t j) { dw[i] = sums[j]; });
  std::memcpy(db, sums + weights, s.O * sizeof(float));
  return 0;
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// All return 0, or -1 if there is no memory for the workspace, or if that of a job would have 8 GB. Tensors are
// contiguous: x [B, C, H, W], w [O, C, KH, KW], bias [O], y, grad and indices [B, O, OH / pool, OW / pool]. The result
// is LeakyReLU of the maxima in windows of pool x pool of the central OH x OW of a convolution with "same" padding.
// Slope 0 is ReLU, 1 is none. Factors may be rounded to operand_type where they are multiplied.

INSVP_FAST_API int conv_fwd(
    void* x, int x_type, const float* w, const float* bias, void* y, int y_type, uint8_t* indices, int64_t B, int64_t C,
    int64_t H, int64_t W, int64_t O, int64_t OH, int64_t OW, int64_t KH, int64_t KW, int64_t dilation, int64_t pool,
    float negative_slope, int operand_type, int threads) {
  ConvFwd a{};
  a.s = shape(B, C, H, W, O, OH, OW, KH, KW, dilation, pool);
  a.x = {x, DType(x_type)};
  a.y = {y, DType(y_type)};
  a.indices = indices;
  a.bias = bias;
  a.negative_slope = negative_slope;
  const int64_t taps = a.s.taps();
  const auto element = [=](int64_t o, int64_t t) { return w[o * taps + t]; };
  return correlate(a, element, DType(operand_type) == DType::bf16, threads);
}

// Without pooling; y is the result of ReLU, or null if there was none. A null d_x is not needed.
INSVP_FAST_API int conv_bwd(
    void* grad, int grad_type, void* y, int y_type, void* x, int x_type, const float* w, void* d_x, int d_x_type,
    float* dw, float* db, int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t OH, int64_t OW, int64_t KH,
    int64_t KW, int64_t dilation, int operand_type, int threads) {
  ConvBwdWeights a{};
  a.s = shape(B, C, H, W, O, OH, OW, KH, KW, dilation, 1);
  a.grad = {grad, DType(grad_type)};
  a.mask = {y, DType(y_type)};
  a.x = {x, DType(x_type)};
  const bool rounded = DType(operand_type) == DType::bf16;
  if (d_x && input_gradient(a, {d_x, DType(d_x_type)}, w, rounded, threads)) return -1;
  return weight_gradient(a, dw, db, rounded, threads);
}

// With pooling; y and indices are results of conv_fwd. A null d_x is not needed.
INSVP_FAST_API int conv_pool_bwd(
    void* grad, int grad_type, void* y, int y_type, const uint8_t* indices, void* x, int x_type, const float* w,
    void* d_x, int d_x_type, float* dw, float* db, int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t OH,
    int64_t OW, int64_t KH, int64_t KW, int64_t pool, float negative_slope, int threads) {
  const ConvShape s = shape(B, C, H, W, O, OH, OW, KH, KW, 1, pool);
  if (OH + KH > INT32_MAX / pool_row(s)) return -1;  // places in a map are integers of 32 bits
  const int64_t chunk = round_up(KW * C, kernels().width);
  const int64_t rows = rows_of_job(s.rows_out(), pool * pool_row(s) + 2 * s.cols_out(), (KH - 1) * pool_row(s));
  const ConvPoolBwd a{s, {grad, DType(grad_type)}, {y, DType(y_type)}, {x, DType(x_type)}, {d_x, DType(d_x_type)},
                      indices, nullptr, rows, ceil_div(s.rows_out(), rows), chunk, negative_slope};
  if (d_x && pool_input_gradient(a, w, threads)) return -1;
  return pool_weight_gradient(a, dw, db, threads);
}

INSVP_FAST_STEP(conv_fwd)
