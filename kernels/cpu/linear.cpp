// linear: a product with a weight that was packed once, for weights that do not change.
// Here: the C functions, the packing, the threads. The arithmetic is in linear_kernel.h.
#include "linear.h"

#include <unistd.h>

#include "host.h"

namespace insvp_fast {
namespace {

const LinearKernels& kernels(DType packed) {
#ifdef INSVP_FAST_X86
  if (packed == DType::bf16) return linear_avx512_bf16;
  if (isa() >= Isa::avx512) return linear_avx512;
  if (isa() >= Isa::avx2) return linear_avx2;
#else
  (void)packed;
#endif
  return linear_generic;
}

int64_t words(const LinearKernels& kernels, int64_t K) { return ceil_div(K, kernels.factors); }

// Half of the second-level cache: the words of x that a block may hold there.
int64_t resident_words() {
  long bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return (bytes > 0 ? bytes : 1 << 20) / 2 / 4;
}

constexpr int64_t kMostRows = 160;  // of a block; with more, too little of K fits into the cache
constexpr int64_t kFewestRows = 48, kFewestPanels = 4;  // of a block, to be worth the copy of its part of x

struct Division {
  int64_t down, across, rows, columns, runs;  // the number of blocks, and the size of each
  int64_t scratch;                            // floats
};

// One thread takes blocks as large as the caches allow, more threads several each, so that none waits long at the end.
Division divide(const LinearKernels& kernels, int64_t M, int64_t N, int64_t K, int threads) {
  const int64_t wanted = threads > 1 ? 8 * threads : 1, panels = ceil_div(N, kernels.columns);
  Division d;
  d.down = ceil_div(M, kMostRows);
  d.across = smaller(ceil_div(wanted, d.down), larger(1, panels / kFewestPanels));
  d.down = larger(d.down, smaller(ceil_div(wanted, d.across), ceil_div(M, kFewestRows)));
  d.rows = ceil_div(ceil_div(M, kernels.rows), d.down) * kernels.rows;
  d.columns = ceil_div(panels, d.across) * kernels.columns;
  d.down = ceil_div(M, d.rows);
  d.across = ceil_div(N, d.columns);
  const int64_t runs = larger(1, ceil_div(words(kernels, K), kDepth));
  const int64_t parts = ceil_div(runs, larger(1, resident_words() / (d.rows * kRowStride)));
  d.runs = ceil_div(runs, parts);
  d.scratch = d.rows * (d.runs * kRowStride + (parts > 1 ? d.columns : kernels.columns));
  return d;
}

float widen(float x) { return x; }
float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

void convert(float& to, float x) { to = x; }
// Rounds to nearest even; a NaN is replaced, because rounding could carry its mantissa into infinity.
void convert(uint16_t& to, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  to = static_cast<uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fc0u);
}

struct Weight {
  const void* data;
  int64_t N, K, row_stride, column_stride;
};

// The panel of the columns from n on: [words, width, factors], zero where w ends.
template <class To, class From>
void pack_panel(To* to, const Weight& w, int64_t n, int64_t width, int64_t factors) {
  const From* from = static_cast<const From*>(w.data) + n * w.row_stride;
  const int64_t columns = smaller(width, w.N - n);
  for (int64_t k = 0; k < w.K; k += factors)
    for (int64_t i = 0; i < width; ++i)
      for (int64_t f = 0; f < factors; ++f, ++to)
        convert(*to, i < columns && k + f < w.K ? widen(from[i * w.row_stride + (k + f) * w.column_stride]) : 0.0f);
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Codes of dtypes are those of DType; `packed_type` is bf16 only where the instruction set multiplies pairs of bf16.

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
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels; ++p) {
    if (pairs) {
      uint16_t* to = static_cast<uint16_t*>(packed) + p * size;
      half ? pack_panel<uint16_t, uint16_t>(to, weight, p * width, width, 2)
           : pack_panel<uint16_t, float>(to, weight, p * width, width, 2);
    } else {
      float* to = static_cast<float*>(packed) + p * size;
      half ? pack_panel<float, uint16_t>(to, weight, p * width, width, 1)
           : pack_panel<float, float>(to, weight, p * width, width, 1);
    }
  }
  return 0;
}

// y [M, N] = epilogue(x [M, K] @ w.T + bias [N]), with w as linear_pack has packed it. Row m of x starts at element
// (m / T) * batch_stride + (m % T) * row_stride, its elements are neighbours; a null bias is absent. The epilogues:
// none; gelu, which also writes what it is applied to into `pre`, unless that is null; gelu_bwd, the factor gelu'(pre).
// Returns 0, or -1 where the workspace cannot be had. Each element is summed in the same order however the work is
// divided, so neither the number of threads nor the other rows change its bits.
INSVP_FAST_API int linear(
    void* x, int x_type, void* packed, int packed_type, const float* bias, void* y, int y_type, void* pre, int pre_type,
    int epilogue, int64_t M, int64_t N, int64_t K, int64_t T, int64_t batch_stride, int64_t row_stride, int threads) {
  if (M == 0 || N == 0) return 0;
  const LinearKernels& k = kernels(DType(packed_type));
  const Division d = divide(k, M, N, K, threads);
  threads = static_cast<int>(larger(1, smaller(threads, d.down * d.across)));
  Workspace memory(threads * d.scratch);
  if (!memory.base) return -1;

  const Linear args{{x, DType(x_type)}, T, batch_stride, row_stride, packed, bias, {y, DType(y_type)},
                    {pre, DType(pre_type)}, Epilogue(epilogue), N, K};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < d.down * d.across; ++i) {
    const int64_t row = i / d.across * d.rows, column = i % d.across * d.columns;
    k.block(args, {row, smaller(d.rows, M - row), column, smaller(d.columns, N - column), d.runs},
            memory.base + thread_id() * d.scratch);
  }
  return 0;
}
