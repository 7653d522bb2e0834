// The interface between conv.cpp and kernel.cpp.
//
// Letters: B images, C channels and H, W size of the input map, O channels and OH, OW size of the output map before
// max-pooling with windows of pool x pool, KH, KW size of the kernel.
//
// A job is one image and some of its pooled rows. It copies the part of the image that it reads into its scratch: in
// fp32, padded with zeros, and split into pool x pool phases, so that neighbors in memory are one window apart. A
// vector then holds one position of several windows, and pooling is a maximum of vectors.
#pragma once
#include "common/abi.h"
#include "common/isa.h"

namespace insvp_fast {

constexpr int64_t kSlack = 32;  // zeros behind the last row of a plane, which a vector may read

struct ConvShape {
  int64_t B, C, H, W, O, OH, OW, KH, KW, dilation, pool;
  int64_t top, left;  // the place of the first tap of the first output; negative in the padding
  [[gnu::always_inline]] int64_t rows_out() const { return OH / pool; }
  [[gnu::always_inline]] int64_t cols_out() const { return OW / pool; }
  [[gnu::always_inline]] int64_t taps() const { return C * KH * KW; }
};

// The scratch of a job. Rows of both maps are `stride` floats apart, so that one list of positions serves both.
struct ConvLayout {
  int64_t rows, bands;  // pooled rows of a job, jobs of an image
  int64_t halo;         // rows of a phase that a job reads beyond its own
  int64_t stride, plane, out_plane;
  int64_t width;  // the places that are computed together: those of a vector, or two
  bool flat;      // whether they run on from row to row, through the padding between them
};

// What multiplies factors that are rounded to bf16: matrix tiles, or vectors of pairs; none if nothing is faster so.
enum class Rounded { none, pairs, tiles };

// The weights for vectors. A word is the weight of one channel or, in bf16, those of two channels.
template <class Word>
struct Taps {
  const Word* w;           // blocks of channels out (the last may have fewer), each [taps, channels]; null: absent
  const int32_t* offsets;  // [pool * pool, taps], where a tap finds its input
  int64_t count;           // of the taps
};

// The second operand of products in matrix tiles (tiles.h); null: absent.
struct TileWeights {
  const uint32_t* pairs;
  const float* bias;
};

struct ConvFwd {
  ConvShape s;
  ConvLayout l;
  Array x, mask, y;          // where the mask is 0 or less (and not NaN), x counts as zero; null: absent
  uint8_t* indices;          // [B, O, rows, columns], the maximum's place in its window; null if pool is 1
  const float* bias;         // [O]; null: absent
  const int32_t* positions;  // of the vectors of a job
  int64_t block;             // channels out that are computed together, at most
  float negative_slope;
  Taps<float> taps;
  Taps<uint32_t> pairs;  // as tiles: instead of taps, where a job's part of the map is finite when it is rounded
  TileWeights tiles;
};

// The gradient of the weights without pooling.
struct ConvBwdWeights {
  ConvShape s;
  ConvLayout l;
  Array grad, mask, x;
  const int32_t *offsets, *positions;  // as in Taps and ConvFwd
  int64_t block;
  Rounded rounded;  // by what, if factors may be rounded
};

// The gradients through max-pooling, of which one position of a window has any. The others would contribute 0 times an
// input or a weight, which is not 0 if that is not finite: the caller makes sure that all are finite. The map lies in
// memory channels last: the rows of a kernel's window are then contiguous, and so are those of the weights,
// [O, KH, chunk], with zeros behind.
struct ConvPoolBwd {
  ConvShape s;
  Array grad, y, x, d_x;
  const uint8_t* indices;
  const float* w;
  int64_t rows, bands;  // pooled rows of a job, jobs of an image
  int64_t chunk;        // KW * C, rounded up to whole vectors
  float negative_slope;
};

struct ConvKernels {
  int64_t width;     // floats of a vector
  int64_t channels;  // of a block, at most
  Rounded rounded;   // what multiplies factors that may be rounded
  void (*fwd)(const ConvFwd&, int64_t job, float* scratch);
  void (*bwd_weights)(const ConvBwdWeights&, int64_t job, float* scratch, float* dw, float* db);
  void (*pool_bwd_weights)(const ConvPoolBwd&, int64_t job, float* scratch, float* dw, float* db);
  void (*pool_bwd_input)(const ConvPoolBwd&, int64_t image, float* scratch);
};

}  // namespace insvp_fast
