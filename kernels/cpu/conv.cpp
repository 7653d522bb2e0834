// Convolutions with few channels, stride 1, of a map's centre; with max-pooling and LeakyReLU behind them.
// Here: the C functions, the division into jobs, the packing, the threads. The arithmetic is in conv_kernel.h.
#include "conv.h"

#include <cstring>

#include "host.h"

namespace insvp_fast {
namespace {

const ConvKernels& kernels() {
#ifdef INSVP_FAST_X86
  if (isa() >= Isa::avx512) return conv_avx512;
  if (isa() >= Isa::avx2) return conv_avx2;
#endif
  return conv_generic;
}

constexpr int64_t kBudget = 128 * 1024;  // floats of a job's scratch, which then stays in the second-level cache
constexpr int64_t kFewestRows = 4;       // of a job, for its halo not to cost more than they

// As many rows as the budget holds, in equal jobs.
int64_t rows_of_job(int64_t rows, int64_t floats_of_row, int64_t floats_of_halo) {
  const int64_t most = larger(kFewestRows, (kBudget - floats_of_halo) / floats_of_row);
  return ceil_div(rows, ceil_div(rows, most));
}

int64_t whole_lines(int64_t floats) { return ceil_div(floats, 16) * 16; }

// `made` is the number of channels that a job holds of what it makes.
ConvLayout layout(const ConvShape& s, int64_t made) {
  ConvLayout l{};
  const int64_t planes = s.pool * s.pool * s.C, cols = s.cols_out(), width = kernels().width;
  const int64_t padded = cols + ceil_div((s.KW - 1) * s.dilation, s.pool);
  l.halo = ceil_div((s.KH - 1) * s.dilation, s.pool);
  l.flat = padded < ceil_div(cols, width) * width;
  const int64_t lines = ceil_div(larger(padded, ceil_div(cols, width) * width), 16);
  l.stride = l.flat ? padded : (lines | 1) * 16;  // an odd number of lines: rows fall into different cache sets
  l.rows = rows_of_job(s.rows_out(), (planes + made) * l.stride, planes * l.halo * l.stride);
  l.bands = ceil_div(s.rows_out(), l.rows);
  l.plane = whole_lines((l.rows + l.halo) * l.stride + kSlack);
  l.out_plane = whole_lines(l.rows * l.stride + kSlack);
  return l;
}

int64_t spare_floats(const ConvShape& s, const ConvLayout& l) {
  return larger(s.W, s.OW) + kSlack + s.pool * l.stride;
}

int64_t most_positions(const ConvShape& s, const ConvLayout& l) {
  return l.rows * ceil_div(larger(l.stride, s.cols_out()), kernels().width) + 1;
}

void list_positions(int32_t* to, const ConvShape& s, const ConvLayout& l) {
  const int64_t width = kernels().width, n = most_positions(s, l), across = ceil_div(s.cols_out(), width);
  for (int64_t i = 0; i < n; ++i)
    to[i] = static_cast<int32_t>(l.flat ? i * width : i / across * l.stride + i % across * width);
}

// For each phase, where a tap (channel, row, column) finds its input.
void list_offsets(int32_t* to, const ConvShape& s, const ConvLayout& l) {
  for (int64_t phase = 0; phase < s.pool * s.pool; ++phase)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < s.KH; ++i)
        for (int64_t j = 0; j < s.KW; ++j) {
          const int64_t y = phase / s.pool + i * s.dilation, x = phase % s.pool + j * s.dilation;
          const int64_t plane = (y % s.pool * s.pool + x % s.pool) * s.C + c;
          *to++ = static_cast<int32_t>(plane * l.plane + y / s.pool * l.stride + x / s.pool);
        }
}

// Equal blocks of channels, none larger than the registers hold.
int64_t block_of(int64_t channels) { return ceil_div(channels, ceil_div(larger(channels, 1), kernels().channels)); }

int32_t* integers(Workspace& memory, int64_t n) { return reinterpret_cast<int32_t*>(memory.take(whole_lines(n))); }

// y = the convolution of x with w, which element(o, tap) names.
template <class Element>
int correlate(ConvFwd a, const Element& element, int threads) {
  const ConvShape& s = a.s;
  const int64_t taps = s.taps(), phases = s.pool * s.pool;
  a.block = block_of(s.O);
  a.l = layout(s, a.block * (s.pool > 1 ? 2 : 1));
  const int64_t jobs = s.B * a.l.bands, n = most_positions(s, a.l);
  const int64_t scratch_size = whole_lines(phases * s.C * a.l.plane + kSlack + 2 * a.block * a.l.out_plane +
                                           spare_floats(s, a.l));
  threads = static_cast<int>(larger(1, smaller(threads, jobs)));
  Workspace memory(whole_lines(s.O * taps) + whole_lines(phases * taps) + whole_lines(n) + threads * scratch_size);
  if (!memory.base) return -1;
  float* w = memory.take(whole_lines(s.O * taps));
  int32_t *offsets = integers(memory, phases * taps), *positions = integers(memory, n);
  float* scratch = memory.take(threads * scratch_size);
  for (int64_t o = 0; o < s.O; ++o) {
    const int64_t first = o / a.block * a.block, channels = smaller(a.block, s.O - first);
    for (int64_t t = 0; t < taps; ++t) w[first * taps + t * channels + o - first] = element(o, t);
  }
  list_offsets(offsets, s, a.l);
  list_positions(positions, s, a.l);
  a.w = w;
  a.offsets = offsets;
  a.positions = positions;
  const auto run = kernels().fwd;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t job = 0; job < jobs; ++job) run(a, job, scratch + thread_id() * scratch_size);
  return 0;
}

// Sums what jobs add to dw and db. Jobs are added up in chunks that do not depend on the number of threads, and the
// chunks in their order, so that the sums are the same bits for every number of threads; at most 64 bound the memory.
template <class Job>
float* sum_jobs(int64_t jobs, int64_t size, int64_t scratch_size, Workspace& memory, int threads, const Job& run) {
  const int64_t chunk = larger(1, ceil_div(jobs, 64)), chunks = larger(1, ceil_div(jobs, chunk));
  float *partials = memory.take(chunks * size), *scratch = memory.take(threads * scratch_size);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t c = 0; c < chunks; ++c) {
    std::memset(partials + c * size, 0, size * sizeof(float));
    for (int64_t job = c * chunk; job < smaller(jobs, (c + 1) * chunk); ++job)
      run(job, scratch + thread_id() * scratch_size, partials + c * size);
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t from = 0; from < size; from += 1024)
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = from; i < smaller(size, from + 1024); ++i) partials[i] += partials[c * size + i];
  return partials;
}

int64_t sum_jobs_floats(int64_t jobs, int64_t size, int64_t scratch_size, int threads) {
  return larger(1, smaller(jobs, 64)) * size + threads * scratch_size;
}

ConvShape shape(int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t OH, int64_t OW, int64_t KH, int64_t KW,
                int64_t dilation, int64_t pool) {
  const int64_t top = (H - OH) / 2 - dilation * (KH - 1) / 2, left = (W - OW) / 2 - dilation * (KW - 1) / 2;
  return {B, C, H, W, O, OH, OW, KH, KW, dilation, pool, top, left};
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// All return 0, or -1 where the workspace cannot be had. Tensors are contiguous: x [B, C, H, W], w [O, C, KH, KW],
// bias [O], y, grad and chosen [B, O, OH / pool, OW / pool]. What is made is the central OH x OW of the map that "same"
// padding makes, then its maxima in windows of pool x pool, then LeakyReLU: slope 0 is ReLU, 1 is none.

INSVP_FAST_API int conv_fwd(
    void* x, int x_type, const float* w, const float* bias, void* y, int y_type, uint8_t* chosen, int64_t B, int64_t C,
    int64_t H, int64_t W, int64_t O, int64_t OH, int64_t OW, int64_t KH, int64_t KW, int64_t dilation, int64_t pool,
    float negative_slope, int threads) {
  ConvFwd a{};
  a.s = shape(B, C, H, W, O, OH, OW, KH, KW, dilation, pool);
  a.x = {x, DType(x_type)};
  a.y = {y, DType(y_type)};
  a.chosen = chosen;
  a.bias = bias;
  a.negative_slope = negative_slope;
  const int64_t taps = a.s.taps();
  return correlate(a, [=](int64_t o, int64_t t) { return w[o * taps + t]; }, threads);
}

// Without pooling; y is the result of ReLU, or null where there was none. A null d_x is not wanted.
INSVP_FAST_API int conv_bwd(
    void* grad, int grad_type, void* y, int y_type, void* x, int x_type, const float* w, void* d_x, int d_x_type,
    float* dw, float* db, int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t OH, int64_t OW, int64_t KH,
    int64_t KW, int64_t dilation, int threads) {
  ConvWeights a{};
  const ConvShape& s = a.s = shape(B, C, H, W, O, OH, OW, KH, KW, dilation, 1);
  a.grad = {grad, DType(grad_type)};
  a.mask = {y, DType(y_type)};
  a.x = {x, DType(x_type)};
  if (d_x) {  // a convolution as well, with the weights turned around
    ConvFwd to{};
    to.s = {B, O, OH, OW, C, H, W, KH, KW, dilation, 1, -s.top - (KH - 1) * dilation, -s.left - (KW - 1) * dilation};
    to.x = a.grad;
    to.mask = a.mask;
    to.y = {d_x, DType(d_x_type)};
    to.negative_slope = 1.0f;
    const int64_t window = KH * KW;
    const auto element = [=](int64_t c, int64_t t) {
      return w[(t / window * C + c) * window + window - 1 - t % window];
    };
    if (correlate(to, element, threads)) return -1;
  }

  a.block = block_of(O);
  a.l = layout(s, O);
  const int64_t taps = s.taps(), jobs = B * a.l.bands, n = most_positions(s, a.l), size = whole_lines(O * taps + O);
  const int64_t scratch_size = whole_lines(C * a.l.plane + kSlack + O * a.l.out_plane + spare_floats(s, a.l));
  threads = static_cast<int>(larger(1, smaller(threads, jobs)));
  Workspace memory(whole_lines(taps) + whole_lines(n) + sum_jobs_floats(jobs, size, scratch_size, threads));
  if (!memory.base) return -1;
  int32_t *offsets = integers(memory, taps), *positions = integers(memory, n);
  list_offsets(offsets, s, a.l);
  list_positions(positions, s, a.l);
  a.offsets = offsets;
  a.positions = positions;
  const auto run = kernels().weights;
  const auto add = [&](int64_t job, float* scratch, float* to) { run(a, job, scratch, to, to + O * taps); };
  const float* sums = sum_jobs(jobs, size, scratch_size, memory, threads, add);
  std::memcpy(dw, sums, O * taps * sizeof(float));
  std::memcpy(db, sums + O * taps, O * sizeof(float));
  return 0;
}

// With pooling; y is the result of conv_fwd and `chosen` what it has chosen. A null d_x is not wanted.
INSVP_FAST_API int conv_pool_bwd(
    void* grad, int grad_type, void* y, int y_type, const uint8_t* chosen, void* x, int x_type, const float* w,
    void* d_x, int d_x_type, float* dw, float* db, int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t OH,
    int64_t OW, int64_t KH, int64_t KW, int64_t pool, float negative_slope, int threads) {
  const ConvShape s = shape(B, C, H, W, O, OH, OW, KH, KW, 1, pool);
  const int64_t row = (OW + KW - 1) * C, chunk = ceil_div(KW * C, kernels().width) * kernels().width;
  const int64_t rows = rows_of_job(s.rows_out(), pool * row + 2 * s.cols_out(), (KH - 1) * row);
  const int64_t bands = ceil_div(s.rows_out(), rows), jobs = B * bands, weights = O * KH * chunk;
  const ConvSparse a{s, {grad, DType(grad_type)}, {y, DType(y_type)}, {x, DType(x_type)}, {d_x, DType(d_x_type)},
                     chosen, nullptr, rows, bands, chunk, negative_slope};
  const int64_t spare = 2 * (W + OW) + KW + 2 * kSlack;

  if (d_x) {
    ConvSparse to = a;
    const int64_t scratch_size = whole_lines((OH + KH - 1) * row + chunk + 2 * s.cols_out() + spare);
    const int workers = static_cast<int>(larger(1, smaller(threads, B)));
    Workspace memory(weights + workers * scratch_size);
    if (!memory.base) return -1;
    float *packed = memory.take(weights), *scratch = memory.take(workers * scratch_size);
    std::memset(packed, 0, weights * sizeof(float));
    for (int64_t o = 0; o < O; ++o)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < KH; ++i)
          for (int64_t j = 0; j < KW; ++j)
            packed[(o * KH + i) * chunk + j * C + c] = w[((o * C + c) * KH + i) * KW + j];
    to.w = packed;
    const auto run = kernels().sparse_input;
#pragma omp parallel for num_threads(workers) schedule(dynamic)
    for (int64_t b = 0; b < B; ++b) run(to, b, scratch + thread_id() * scratch_size);
  }

  const int64_t size = whole_lines(weights + O);
  const int64_t scratch_size = whole_lines((rows * pool + KH - 1) * row + chunk + 2 * rows * s.cols_out() + spare);
  threads = static_cast<int>(larger(1, smaller(threads, jobs)));
  Workspace memory(sum_jobs_floats(jobs, size, scratch_size, threads));
  if (!memory.base) return -1;
  const auto run = kernels().sparse_weights;
  const auto add = [&](int64_t job, float* scratch, float* to) { run(a, job, scratch, to, to + weights); };
  const float* sums = sum_jobs(jobs, size, scratch_size, memory, threads, add);
  for (int64_t o = 0; o < O; ++o)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t i = 0; i < KH; ++i)
        for (int64_t j = 0; j < KW; ++j)
          dw[((o * C + c) * KH + i) * KW + j] = sums[(o * KH + i) * chunk + j * C + c];
  std::memcpy(db, sums + weights, O * sizeof(float));
  return 0;
}
