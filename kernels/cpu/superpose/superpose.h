// The interface between superpose.cpp and kernel.cpp.
//
// Letters: B images, C channels, H, W image size, P patch size, N patches of an image, K = C*P*P, R hidden width.
// In packed weights and scratch, a row of K elements takes `stride` floats and is zero from K to `width`.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

constexpr int kTile = 12;  // patches computed together, so that each loaded weight is used 12 times

struct Geometry {
  int64_t C, H, W, P, N, K, R;
  int64_t width;   // K rounded up to whole steps of the widest instruction set
  int64_t stride;  // an odd number of cache lines
  int64_t ld;      // floats from one patch's hidden row to the next, at least R + 1
};

struct SuperposeFwd {
  Geometry g;
  Array image, global_prompt, tokens;
  float* hidden;    // [B*N, R]
  const float* w1;  // [R, stride]
  const float* b1;  // [R]
  const float* w2;  // [R + 1, stride], transposed, times patch_weight; the last row is the bias
  const uint8_t* kept;  // [B, C, H, W]: the patch prompt counts where it is 1 and not 0; null: everywhere
  float global_weight;
};

struct SuperposeBwd {
  Geometry g;
  Array grad, image, d_image, d_global;
  const float* hidden;  // [B*N, R]
  const float *w1, *w2;  // as above, w2 without the bias
  const uint8_t* kept;
  float global_weight;
};

// The weight gradients of a chunk of patches; dw2 and db2 still lack the factor patch_weight.
struct Partial {
  float* dw1;  // [R, stride]
  float* dw2;  // [R + 1, stride], transposed; the last row is db2
  float* db1;  // [R]
};

// Each computes `count` patches from `first` on, kTile at most. The scratch holds two tiles of rows, then two of hidden
// rows.
struct SuperposeKernels {
  void (*fwd)(const SuperposeFwd&, int64_t first, int64_t count, float* scratch);
  void (*bwd)(const SuperposeBwd&, int64_t first, int64_t count, float* scratch, const Partial&);
};

}  // namespace insvp_fast
