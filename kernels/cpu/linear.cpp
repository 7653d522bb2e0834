// linear: a product with a weight that was packed once, for weights that do not change.
// Here: the C functions, the packing, the threads. The arithmetic is in linear_kernel.h.
#include "linear.h"

#include <cstring>

#include "host.h"

namespace insvp_fast {
namespace {

const LinearKernels& kernels() {
#ifdef INSVP_FAST_X86
  if (isa() >= Isa::avx512) return linear_avx512;
  if (isa() >= Isa::avx2) return linear_avx2;
#endif
  return linear_generic;
}

constexpr int64_t kMostRows = 200;  // of a block, whose part of x then takes less than half of the second-level cache
constexpr int64_t kFewestRows = 48, kFewestPanels = 8;  // of a block, to be worth the copy of its part of x

struct Blocks {
  int64_t rows, columns;         // of one block
  int64_t row_blocks, col_blocks;
};

// One thread takes blocks as large as the caches allow, more threads several each, so that none waits long at the end.
Blocks divide(int64_t M, int64_t N, int threads) {
  const int64_t wanted = threads > 1 ? 8 * threads : 1, panels = ceil_div(N, kernels().columns);
  int64_t down = larger(1, ceil_div(M, kMostRows));
  const int64_t across = smaller(ceil_div(wanted, down), larger(1, panels / kFewestPanels));
  down = larger(down, smaller(ceil_div(wanted, across), ceil_div(M, kFewestRows)));
  const int64_t rows = ceil_div(ceil_div(M, kernels().rows), down) * kernels().rows;
  const int64_t columns = ceil_div(panels, across) * kernels().columns;
  return {rows, columns, ceil_div(M, rows), ceil_div(N, columns)};
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// The number of floats that linear_pack writes.
INSVP_FAST_API int64_t linear_packed_size(int64_t N, int64_t K) {
  return ceil_div(N, kernels().columns) * kernels().columns * K;
}

// Packs w [N, K], element (n, k) at n * row_stride + k * column_stride.
INSVP_FAST_API int linear_pack(
    float* packed, const float* w, int64_t N, int64_t K, int64_t row_stride, int64_t column_stride, int threads) {
  const int64_t width = kernels().columns, panels = ceil_div(N, width);
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t first = 0; first < K; first += kDepth) {
      const int64_t depth = smaller(kDepth, K - first), columns = smaller(width, N - p * width);
      float* to = packed + (first * panels + p * depth) * width;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < width; ++i)
          to[k * width + i] = i < columns ? w[(p * width + i) * row_stride + (first + k) * column_stride] : 0.0f;
    }
  return 0;
}

// y [M, N] = x [M, K] @ w.T + bias [N], with w as linear_pack has packed it; x and y are contiguous, a null bias is
// absent. Returns 0, or -1 where the workspace cannot be had. Each element is summed in the same order however the work
// is divided, so neither the number of threads nor the other rows change its bits.
INSVP_FAST_API int linear(
    const float* x, const float* packed, const float* bias, float* y, int64_t M, int64_t N, int64_t K, int threads) {
  if (M == 0 || N == 0) return 0;
  const Blocks blocks = divide(M, N, threads);
  const int64_t count = blocks.row_blocks * blocks.col_blocks, width = kernels().columns;
  const int64_t packed_columns = ceil_div(N, width) * width, scratch_size = blocks.rows * kRowStride;
  threads = static_cast<int>(larger(1, smaller(threads, count)));
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;

  const auto block = kernels().block;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    float* rows = memory.base + thread_id() * scratch_size;
    const int64_t m = i / blocks.col_blocks * blocks.rows, n = i % blocks.col_blocks * blocks.columns;
    LinearBlock b{rows, nullptr, bias ? bias + n : nullptr, y + m * N + n,
                  smaller(blocks.rows, M - m), 0, smaller(blocks.columns, N - n), N, true};
    for (int64_t k = 0; b.first || k < K; k += kDepth) {
      b.depth = smaller(kDepth, K - k);
      for (int64_t j = 0; j < b.rows; ++j)
        std::memcpy(rows + j * kRowStride, x + (m + j) * K + k, b.depth * sizeof(float));
      b.w = packed + k * packed_columns + n * b.depth;
      block(b);
      b.first = false;
    }
  }
  return 0;
}
