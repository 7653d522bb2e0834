// linear: x @ w.T + bias with a weight that does not change and was packed once.
// The C functions, the packing and the threads are here, the arithmetic is in kernel.cpp.
#include "linear.h"

#include <unistd.h>

#include "common/bf16.h"
#include "common/host.h"
#include "common/step.h"

namespace insvp_fast {
namespace {

const LinearKernels& kernels(DType packed) {
  return best_kernels<LinearKernels>(packed == DType::bf16 ? isa() : isa(Isa::avx512));
}

int64_t words(const LinearKernels& kernels, int64_t K) { return round_up(ceil_div(K, kernels.factors), kernels.step); }

// The words of x that a block may hold in the second-level cache: half of it.
int64_t resident_words() {
  long bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return (bytes > 0 ? bytes : 1 << 20) / 2 / 4;
}

constexpr int64_t kWorthCopyingRows = 48, kWorthCopyingPanels = 4;  // the size of a block that repays copying its x

struct Division {
  int64_t down, across;         // the number of blocks
  int64_t rows, columns, runs;  // the size of the largest
  int64_t scratch;              // floats
};

struct Range {
  int64_t first, size;
};

// Part `i` of `size` things that come in units, of `parts` that differ by one unit at most.
Range part(int64_t i, int64_t parts, int64_t size, int64_t unit) {
  const int64_t units = ceil_div(size, unit), first = units * i / parts * unit;
  return {first, smaller(size, units * (i + 1) / parts * unit) - first};
}

// Blocks have as many rows as the kernels take, and are as many as the threads need. Of the divisions in which the
// thread that computes most computes least, this is the one that reads the least of x and w.
Division divide(const LinearKernels& kernels, int64_t M, int64_t N, int64_t K, int threads) {
  const int64_t tiles = ceil_div(M, kernels.rows), panels = ceil_div(N, kernels.columns);
  const int64_t runs = larger(1, ceil_div(words(kernels, K), kernels.depth));
  const int64_t wanted = threads > 1 ? kernels.blocks * threads : 1;
  Division d = {};
  double least_work = 2.0;  // of a thread, as a part of all
  int64_t least_read = 0;
  for (int64_t across = 1; across <= smaller(wanted, larger(1, panels / kWorthCopyingPanels)); ++across) {
    const int64_t enough = smaller(ceil_div(wanted, across), ceil_div(M, kWorthCopyingRows));
    const int64_t fewest = smaller(tiles, larger(ceil_div(M, kernels.most_rows), enough));
    for (int64_t down = fewest; down <= smaller(tiles, 2 * fewest); ++down) {
      const int64_t blocks = down * across, read = down * N + across * M;
      const double work = static_cast<double>(ceil_div(blocks, threads)) / static_cast<double>(blocks);
      if (work > least_work || (work == least_work && read >= least_read)) continue;
      least_work = work, least_read = read, d.down = down, d.across = across;
    }
  }
  d.rows = ceil_div(tiles, d.down) * kernels.rows;
  d.columns = ceil_div(panels, d.across) * kernels.columns;
  const int64_t stride = run_stride(kernels.depth), resident_runs = larger(1, resident_words() / (d.rows * stride));
  const int64_t parts = ceil_div(runs, resident_runs);
  d.runs = ceil_div(runs, parts);
  d.scratch = d.rows * (d.runs * stride + (parts > 1 ? d.columns : 2 * kernels.columns));
  return d;
}

// Whether a matrix that is written here is better written past the caches: whole cache lines, and so many that writing
// them so was measured to be faster.
bool goes_past_caches(const LinearKernels& kernels, Array pre, int64_t M, int64_t N) {
  constexpr int64_t kLineBytes = 64, kMany = 4 << 20;
  const int64_t row = N * size_of(pre.type);
  const bool lines = row % kLineBytes == 0 && reinterpret_cast<uintptr_t>(pre.data) % kLineBytes == 0;
  return kernels.past_caches && pre.data && pre.type == DType::bf16 && lines && M * row >= kMany;
}

struct Weight {
  const void* data;
  int64_t N, K, row_stride, column_stride;
};

// Packs the panel that starts at column n: [words, width, factors], with zeros behind the end of w.
template <class To, class From>
void pack_panel(To* to, const Weight& w, int64_t n, int64_t width, int64_t words, int64_t factors) {
  const From* from = static_cast<const From*>(w.data) + n * w.row_stride;
  const int64_t columns = smaller(width, w.N - n);
  for (int64_t k = 0; k < words * factors; k += factors)
    for (int64_t i = 0; i < width; ++i)
      for (int64_t f = 0; f < factors; ++f, ++to)
        narrow(*to, i < columns && k + f < w.K ? widen(from[i * w.row_stride + (k + f) * w.column_stride]) : 0.0f);
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Types are codes of DType. `packed_type` is bf16 only where the instruction set multiplies pairs of bf16.

// The number of elements that linear_pack writes.
INSVP_FAST_API int64_t linear_packed_size(int packed_type, int64_t N, int64_t K) {
  const LinearKernels& k = kernels(DType(packed_type));
  return ceil_div(N, k.columns) * k.columns * words(k, K) * k.factors;
}

// Packs w [N, K], element (n, k) at n * row_stride + k * column_stride.
INSVP_FAST_API int linear_pack(void* packed, int packed_type, const void* w, int w_type, int64_t N, int64_t K,
                               int64_t row_stride, int64_t column_stride, int threads) {
  const LinearKernels& k = kernels(DType(packed_type));
  const int64_t width = k.columns, panels = ceil_div(N, width), size = width * words(k, K) * k.factors;
  const Weight weight{w, N, K, row_stride, column_stride};
  const bool pairs = DType(packed_type) == DType::bf16, half = DType(w_type) == DType::bf16;
  for_each_job(panels, useful_threads(threads, panels), nullptr, 0, [&](int64_t p, float*) {
    if (pairs) {
      bf16* to = static_cast<bf16*>(packed) + p * size;
      half ? pack_panel<bf16, bf16>(to, weight, p * width, width, words(k, K), 2)
           : pack_panel<bf16, float>(to, weight, p * width, width, words(k, K), 2);
    } else {
      float* to = static_cast<float*>(packed) + p * size;
      half ? pack_panel<float, bf16>(to, weight, p * width, width, words(k, K), 1)
           : pack_panel<float, float>(to, weight, p * width, width, words(k, K), 1);
    }
  });
  return 0;
}

// y [M, N] = epilogue(x [M, K] @ w.T + bias [N]), with w packed by linear_pack. Row m of x starts at element
// (m / T) * batch_stride + (m % T) * row_stride and is contiguous; a null bias is absent. The epilogues are none;
// activate, which also writes its argument into `pre`, unless that is null; activate_bwd, a multiplication with the
// activation's derivative at `pre`.
// Returns 0, or -1 if there is no memory for the workspace. The order of each element's sum does not depend on how the
// work is divided, so neither the number of threads nor the other rows change its bits.
INSVP_FAST_API int linear(
    void* x, int x_type, void* packed, int packed_type, const float* bias, void* y, int y_type, void* pre, int pre_type,
    int epilogue, int activation, int64_t M, int64_t N, int64_t K, int64_t T, int64_t batch_stride, int64_t row_stride,
    int threads) {
  if (M == 0 || N == 0) return 0;
  const LinearKernels& k = kernels(DType(packed_type));
  const Division d = divide(k, M, N, K, threads);
  threads = useful_threads(threads, d.down * d.across);
  Workspace memory(threads * d.scratch);
  if (!memory.base) return -1;

  const Array kept{pre, DType(pre_type)};
  const bool past_caches = Epilogue(epilogue) == Epilogue::activate && goes_past_caches(k, kept, M, N);
  const Linear args{{x, DType(x_type)}, T, batch_stride, row_stride, packed, bias, {y, DType(y_type)}, kept,
                    past_caches, Epilogue(epilogue), Activation(activation), N, K};
  // Where the columns can be shared, each thread has some of its own for all rows: the rows of one image are so few
  // tiles that their parts differ more.
  const bool by_columns = d.across % threads == 0;
  for_each_job(d.down * d.across, threads, memory.base, d.scratch, [&](int64_t block, float* own) {
    const Range rows = part(by_columns ? block % d.down : block / d.across, d.down, M, k.rows);
    const Range columns = part(by_columns ? block / d.down : block % d.across, d.across, N, k.columns);
    k.block(args, {rows.first, rows.size, columns.first, columns.size, d.runs}, own);
  });
  return 0;
}

INSVP_FAST_STEP(linear)
