// superpose: image, prompts and patch prompter -> the prompted image, unfolded; forward and backward.
// The C functions, the packing of the weights and the threads are here, the arithmetic is in kernel.cpp.
#include "superpose.h"

#include <cstring>

#include "common/host.h"
#include "common/step.h"

namespace insvp_fast {
namespace {

Geometry geometry(int64_t C, int64_t H, int64_t W, int64_t P, int64_t R) {
  Geometry g{C, H, W, P, (H / P) * (W / P), C * P * P, R, 0, 0, 0};
  g.width = round_up(g.K, 32);
  g.stride = odd_lines(g.width);
  g.ld = whole_lines(R + 1);
  return g;
}

int64_t scratch_floats(const Geometry& g) { return 2 * kTile * (g.stride + g.ld); }

void pack_w1(float* to, const float* w1, const Geometry& g) {
  for (int64_t r = 0; r < g.R; ++r, to += g.stride) {
    std::memcpy(to, w1 + r * g.K, g.K * sizeof(float));
    std::memset(to + g.K, 0, (g.stride - g.K) * sizeof(float));
  }
}

void pack_w2(float* to, const float* w2, float scale, const Geometry& g) {
  for (int64_t r = 0; r < g.R; ++r, to += g.stride) {
    for (int64_t k = 0; k < g.K; ++k) to[k] = scale * w2[k * g.R + r];
    std::memset(to + g.K, 0, (g.stride - g.K) * sizeof(float));
  }
}

// The number of patches whose weight gradients are summed together. It depends only on the number of patches, so that
// the sums are the same bits for every number of threads. The memory is that of 64 chunks at most.
int64_t chunk_size(int64_t patches) { return larger(96, round_up(ceil_div(patches, 64), kTile)); }

struct WeightGrads {
  float *dw1, *db1, *dw2, *db2;  // [R, K], [R], [K, R], [K]
};

int64_t partial_size(const Geometry& g) { return (2 * g.R + 1) * g.stride + whole_lines(g.R); }

Partial partial_at(float* p, const Geometry& g) {
  return {p, p + g.R * g.stride, p + (2 * g.R + 1) * g.stride};
}

void finish(const WeightGrads& out, const Partial& sums, float patch_weight, const Geometry& g) {
  for (int64_t r = 0; r < g.R; ++r) std::memcpy(out.dw1 + r * g.K, sums.dw1 + r * g.stride, g.K * sizeof(float));
  std::memcpy(out.db1, sums.db1, g.R * sizeof(float));
  for (int64_t k = 0; k < g.K; ++k) {
    for (int64_t r = 0; r < g.R; ++r) out.dw2[k * g.R + r] = patch_weight * sums.dw2[r * g.stride + k];
    out.db2[k] = patch_weight * sums.dw2[g.R * g.stride + k];
  }
}

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 if there is no memory for the workspace. A null global_prompt or mask is absent, a null d_image
// or d_global is not needed. Tensors are contiguous: images and the mask [B, C, H, W], tokens and grad [B, N, K],
// hidden [B, N, R], w1 [R, K], w2 [K, R].

INSVP_FAST_API int superpose_fwd(
    void* image, int image_type, void* global_prompt, int global_type, const float* w1, const float* b1,
    const float* w2, const float* b2, const uint8_t* kept, void* tokens, int tokens_type, float* hidden, int64_t B,
    int64_t C, int64_t H, int64_t W, int64_t P, int64_t R, float global_weight, float patch_weight, int threads) {
  const Geometry g = geometry(C, H, W, P, R);
  const int64_t patches = B * g.N, tiles = ceil_div(patches, kTile), scratch_size = scratch_floats(g);
  threads = useful_threads(threads, tiles);

  Workspace memory((2 * R + 1) * g.stride + threads * scratch_size);
  if (!memory.base) return -1;
  float *packed1 = memory.take(R * g.stride), *packed2 = memory.take((R + 1) * g.stride);
  float* scratch = memory.take(threads * scratch_size);
  pack_w1(packed1, w1, g);
  pack_w2(packed2, w2, patch_weight, g);
  std::memset(packed2 + R * g.stride, 0, g.stride * sizeof(float));
  for (int64_t k = 0; k < g.K; ++k) packed2[R * g.stride + k] = patch_weight * b2[k];

  const SuperposeFwd args{g, {image, DType(image_type)}, {global_prompt, DType(global_type)},
                          {tokens, DType(tokens_type)}, hidden, packed1, b1, packed2, kept, global_weight};
  const auto kernel = best_kernels<SuperposeKernels>(isa()).fwd;
  for_each_job(tiles, threads, scratch, scratch_size, [&](int64_t tile, float* own) {
    kernel(args, tile * kTile, smaller(kTile, patches - tile * kTile), own);
  });
  return 0;
}

INSVP_FAST_API int superpose_bwd(
    void* grad, int grad_type, void* image, int image_type, const float* hidden, const float* w1, const float* w2,
    const uint8_t* kept, void* d_image, int d_image_type, void* d_global, int d_global_type, float* dw1, float* db1,
    float* dw2, float* db2, int64_t B, int64_t C, int64_t H, int64_t W, int64_t P, int64_t R, float global_weight,
    float patch_weight, int threads) {
  const Geometry g = geometry(C, H, W, P, R);
  const int64_t patches = B * g.N, chunk = chunk_size(patches), chunks = ceil_div(patches, chunk);
  const int64_t scratch_size = scratch_floats(g), size = partial_size(g);
  const int64_t partials_size = larger(1, chunks) * size;
  threads = useful_threads(threads, chunks);

  Workspace memory(2 * R * g.stride + threads * scratch_size + partials_size);
  if (!memory.base) return -1;
  float *packed1 = memory.take(R * g.stride), *packed2 = memory.take(R * g.stride);
  float *scratch = memory.take(threads * scratch_size), *partials = memory.take(partials_size);
  pack_w1(packed1, w1, g);
  pack_w2(packed2, w2, patch_weight, g);

  const SuperposeBwd args{g, {grad, DType(grad_type)}, {image, DType(image_type)}, {d_image, DType(d_image_type)},
                          {d_global, DType(d_global_type)}, hidden, packed1, packed2, kept, global_weight};
  const auto kernel = best_kernels<SuperposeKernels>(isa()).bwd;
  for_each_job(chunks, threads, scratch, scratch_size, [&](int64_t c, float* own) {
    const Partial sums = partial_at(partials + c * size, g);
    std::memset(partials + c * size, 0, size * sizeof(float));
    for (int64_t first = c * chunk, end = smaller(patches, first + chunk); first < end; first += kTile)
      kernel(args, first, smaller(kTile, end - first), own, sums);
  });
  if (chunks == 0) std::memset(partials, 0, size * sizeof(float));
  sum_arrays(partials, chunks, size, threads);
  finish({dw1, db1, dw2, db2}, partial_at(partials, g), patch_weight, g);
  return 0;
}

INSVP_FAST_STEP(superpose_fwd)
