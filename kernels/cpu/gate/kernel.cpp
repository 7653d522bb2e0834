// The arithmetic of gate on a range of rows. What a row needs between its passes stays in the caches.
#include "common/activation.h"
#include "common/array.h"
#include "common/sizes.h"
#include "gate.h"

namespace {

using namespace insvp_fast;

template <class T>
inline T* row_of(Array array, int64_t row, int64_t D) {
  return array.data ? static_cast<T*>(array.data) + row * D : nullptr;
}

template <class T, Activation ACTIVATION>
void fwd_rows(const GateFwd& args, int64_t first, int64_t last, float* h) {
  const GateFwd a = args;  // no store can change it
  const int64_t D = a.D;
  for (int64_t row = first; row < last; ++row) {
    const T *pre = row_of<T>(a.pre, row, D), *factor = row_of<T>(a.factor, row, D);
    T* hidden = row_of<T>(a.hidden, row, D);
    vec total = {};
    for_each_vector(D, [&](int64_t i, int64_t n) {
      vec v = activate<sizeof(T) == 2>(ACTIVATION, load_some(pre + i, n));
      if (factor) v *= load_some(factor + i, n);
      if (!a.normalize) return store_some(hidden + i, v, n);
      store_some(h + i, v, n);
      total += v;
    });
    if (!a.normalize) continue;
    const float mean = sum(total) / D;
    vec squares = {};
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const vec v = first_of(load_some(h + i, n) - mean, n);
      squares += v * v;
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / D + a.eps);
    for_each_vector(D, [&](int64_t i, int64_t n) { store_some(hidden + i, (load_some(h + i, n) - mean) * rstd, n); });
  }
}

template <class T, Activation ACTIVATION>
void bwd_rows(const GateBwd& args, int64_t first, int64_t last, float* scratch) {
  const GateBwd a = args;
  const int64_t D = a.D;
  float *opened = scratch, *slopes = opened + whole_lines(D), *h = slopes + whole_lines(D);
  for (int64_t row = first; row < last; ++row) {
    const T *grad = row_of<T>(a.d_hidden, row, D), *pre = row_of<T>(a.pre, row, D);
    const T* factor = row_of<T>(a.factor, row, D);
    T *d_pre = row_of<T>(a.d_pre, row, D), *d_factor = row_of<T>(a.d_factor, row, D);
    const auto finish = [&](int64_t i, int64_t n, vec d, vec value, vec slope) {
      store_some(d_pre + i, factor ? d * load_some(factor + i, n) * slope : d * slope, n);
      if (factor) store_some(d_factor + i, d * value, n);
    };
    vec total = {};
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const Activated v = activated<sizeof(T) == 2>(ACTIVATION, load_some(pre + i, n));
      if (!a.normalize) return finish(i, n, load_some(grad + i, n), v.value, v.slope);
      store_some(opened + i, v.value, n);
      store_some(slopes + i, v.slope, n);
      const vec product = factor ? v.value * load_some(factor + i, n) : v.value;
      store_some(h + i, product, n);
      total += product;
    });
    if (!a.normalize) continue;
    const float mean = sum(total) / D;
    vec squares = {}, grads = {}, products = {};
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const vec v = first_of(load_some(h + i, n) - mean, n), d = load_some(grad + i, n);
      squares += v * v;
      grads += d;
      products += d * v;
    });
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / D + a.eps);
    const float mean_grad = sum(grads) / D, along = sum(products) / D * rstd * rstd;
    for_each_vector(D, [&](int64_t i, int64_t n) {
      const vec d = rstd * (load_some(grad + i, n) - mean_grad - along * (load_some(h + i, n) - mean));
      finish(i, n, d, load_some(opened + i, n), load_some(slopes + i, n));
    });
  }
}

// By the codes of the activations.
template <class T>
constexpr decltype(GateKernels::fwd) kFwd[] = {fwd_rows<T, Activation::gelu>, fwd_rows<T, Activation::gelu_tanh>,
                                               fwd_rows<T, Activation::quick_gelu>, fwd_rows<T, Activation::silu>};
template <class T>
constexpr decltype(GateKernels::bwd) kBwd[] = {bwd_rows<T, Activation::gelu>, bwd_rows<T, Activation::gelu_tanh>,
                                               bwd_rows<T, Activation::quick_gelu>, bwd_rows<T, Activation::silu>};

void fwd(const GateFwd& a, int64_t first, int64_t last, float* scratch) {
  const auto& rows = a.pre.type == DType::f32 ? kFwd<float> : kFwd<bf16>;
  rows[static_cast<int>(a.activation)](a, first, last, scratch);
}

void bwd(const GateBwd& a, int64_t first, int64_t last, float* scratch) {
  const auto& rows = a.pre.type == DType::f32 ? kBwd<float> : kBwd<bf16>;
  rows[static_cast<int>(a.activation)](a, first, last, scratch);
}

}  // namespace

template <>
const GateKernels& insvp_fast::kernels_for<GateKernels, Isa::INSVP_FAST_ISA>() {
  static constexpr GateKernels kernels{fwd, bwd};
  return kernels;
}
