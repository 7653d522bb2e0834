// absorbed_attention: softmax attention of few queries to tokens, forward and backward. The tokens themselves serve as
// keys and values: the weights of keys and values are multiplied with the queries and with the results instead.
// The C functions and the threads are here, the arithmetic is in kernel.cpp.
#include "absorbed_attention.h"

#include "common/host.h"
#include "common/step.h"

namespace insvp_fast {
namespace {

// Calls kernel(args, image, first, count, scratch) for parts of `size` rows or tokens of each image.
template <class Args>
int for_parts(void (*kernel)(const Args&, int64_t, int64_t, int64_t, float*), const Args& args, int64_t B,
              int64_t total, int64_t size, int64_t scratch_size, int threads) {
  const int64_t parts = ceil_div(total, size);
  threads = useful_threads(threads, B * parts);
  Workspace memory(threads * scratch_size);
  if (!memory.base) return -1;
  for_each_job(B * parts, threads, memory.base, scratch_size, [&](int64_t job, float* own) {
    const int64_t first = job % parts * size;
    kernel(args, job / parts, first, smaller(size, total - first), own);
  });
  return 0;
}

constexpr int64_t kTokens = 16;  // of a job

}  // namespace
}  // namespace insvp_fast

using namespace insvp_fast;

// Both return 0, or -1 if there is no memory for the workspace. A null pointer is an absent tensor. All tensors are
// contiguous and have the dtype `type`. No result depends on the number of threads, or on other images.

INSVP_FAST_API int absorbed_attention_rows(
    void* rows, void* x, void* softmax, int type, const int64_t* num_keys, float scale, void* weights, void* means,
    int64_t B, int64_t S, int64_t E, int64_t R, int threads) {
  const auto array = [&](void* data) { return Array{data, DType(type)}; };
  const AbsorbedRows args{S, E, R, array(rows), array(x), array(softmax), num_keys, scale,
                          array(weights), array(means)};
  const int64_t scratch_size = kRows * round_up(E, kTogether * kLine) + (kRows + 1) * whole_lines(S);
  return for_parts(best_kernels<AbsorbedKernels>(isa()).rows, args, B, R, kRows, scratch_size, threads);
}

INSVP_FAST_API int absorbed_attention_tokens(
    void* d_means, void* softmax, void* d_scores, void* rows, void* d_first, int type, void* d_x, int64_t B, int64_t S,
    int64_t E, int64_t R, int64_t T, int threads) {
  const auto array = [&](void* data) { return Array{data, DType(type)}; };
  const AbsorbedTokens args{S, E, R, T, array(d_means), array(softmax), array(d_scores), array(rows), array(d_first),
                            array(d_x)};
  const int64_t scratch_size = whole_lines(2 * kTogether * R);
  return for_parts(best_kernels<AbsorbedKernels>(isa()).tokens, args, B, S, kTokens, scratch_size, threads);
}

INSVP_FAST_STEP(absorbed_attention_rows)
INSVP_FAST_STEP(absorbed_attention_tokens)
