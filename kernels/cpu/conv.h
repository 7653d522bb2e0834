// What conv.cpp and the files of the instruction sets agree on.
//
// Letters: B images, C channels and H, W size of the map that is read, O channels and OH, OW size of the map that is
// made, before max-pooling with windows of pool x pool; KH, KW size of the kernel.
//
// A job is one image and some of its pooled rows. It copies what it reads of the image into its scratch: fp32, padded
// with zeros, and taken apart into pool x pool phases, so that neighbours in memory are one window apart. Then all
// positions of a window's candidate are one vector, and pooling is a maximum of vectors.
#pragma once
#include "common.h"

namespace insvp_fast {

constexpr int64_t kSlack = 16;  // zeros behind the last row of a plane, which a vector may read

struct ConvShape {
  int64_t B, C, H, W, O, OH, OW, KH, KW, dilation, pool;
  int64_t top, left;  // the place of the first tap of the first output; negative in the padding
  int64_t rows_out() const { return OH / pool; }
  int64_t cols_out() const { return OW / pool; }
  int64_t taps() const { return C * KH * KW; }
};

// The scratch of a job. Rows of both maps are `stride` floats apart, so that one list of positions serves both.
struct ConvLayout {
  int64_t rows, bands;  // pooled rows of a job, jobs of an image
  int64_t halo;         // rows of a phase that a job reads beyond its own
  int64_t stride, plane, out_plane;
  bool flat;  // the vectors run on from row to row, through the padding between them
};

struct ConvFwd {
  ConvShape s;
  ConvLayout l;
  Array x, mask, y;  // where the mask is 0 or less, not where NaN, x counts as zero; null: absent
  uint8_t* chosen;   // [B, O, rows, columns], the maximum's place in its window; null where pool is 1
  const float* w;    // blocks of `block` channels (the last may have fewer), each [taps, channels]
  const float* bias; // [O]; null: absent
  const int32_t* offsets;    // [pool * pool, taps]
  const int32_t* positions;  // of the vectors of a job
  int64_t block;
  float negative_slope;
};

// The gradient by the weights without pooling.
struct ConvWeights {
  ConvShape s;
  ConvLayout l;
  Array grad, mask, x;
  const int32_t *offsets, *positions;
  int64_t block;
};

// The gradients behind max-pooling, where one position of a window has any. Where all positions are computed, one without
// a gradient adds 0 times a value, which matters if that is not finite: the caller asks for finite values. The map lies in memory channels last: the
// rows of a kernel's window are then contiguous, and so are those of the weights, [O, KH, chunk], with zeros behind.
struct ConvSparse {
  ConvShape s;
  Array grad, y, x, d_x;
  const uint8_t* chosen;
  const float* w;
  int64_t rows, bands;  // pooled rows of a job, jobs of an image
  int64_t chunk;  // KW * C, rounded up to whole vectors
  float negative_slope;
};

struct ConvKernels {
  int64_t width;     // floats of a vector
  int64_t channels;  // most of a block
  void (*fwd)(const ConvFwd&, int64_t job, float* scratch);
  void (*weights)(const ConvWeights&, int64_t job, float* scratch, float* dw, float* db);
  void (*sparse_weights)(const ConvSparse&, int64_t job, float* scratch, float* dw, float* db);
  void (*sparse_input)(const ConvSparse&, int64_t image, float* scratch);
};

extern const ConvKernels conv_generic, conv_avx2, conv_avx512;

}  // namespace insvp_fast
