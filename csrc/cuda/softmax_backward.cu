// The gradient of the causal softmax on the GPU: scale * p * (g - sum(g p)), where g is the gradient of the probabilities
// p that the forward kept. Rows go by as in the forward: in registers up to kSlots accesses of each, or else twice.
#include "cuda/softmax.cuh"

namespace neox {
namespace {

// From column k on, the probabilities and their gradient before the head mask; zero where nothing is seen, or dropped.
template <class T, bool kGeneral, int kVec>
__device__ void load_gradient(const SoftmaxArgs& args, const Plan& plan, const Row& row, const T* grad, const T* probs, int k,
                              Pack<T, kVec>& g, Pack<T, kVec>& p) {
  load_vector(grad, k, row.visible, !kGeneral || plan.aligned, g);
  load_vector(probs, k, row.visible, !kGeneral || plan.aligned, p);
  uint32_t hidden = 0;
  if constexpr (kGeneral) {
    if (args.rng != nullptr) hidden = dropped<kVec>(args, row, k);
  }
  hidden |= (~0u << min(row.visible - k, kVec)) & ((1u << kVec) - 1);
  if (hidden != 0) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) g.at[j] = (hidden >> j & 1) != 0 ? T(0.0f) : g.at[j];
  }
}

template <class T, int kVec>
__device__ float dot_product(const Pack<T, kVec>& g, const Pack<T, kVec>& p, float sum) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum = __fmaf_rn(static_cast<float>(g.at[j]), static_cast<float>(p.at[j]), sum);
  return sum;
}

template <class T, int kVec>
__device__ float add_up(const Pack<T, kVec>& p, float sum) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum += static_cast<float>(p.at[j]);
  return sum;
}

template <class T, class Out, bool kGeneral, int kVec>
__device__ void store_gradient(const SoftmaxArgs& args, const Plan& plan, const Row& row, Out* out, int k, float factor,
                               float dot, const Pack<T, kVec>& g, const Pack<T, kVec>& p) {
  float y[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    y[j] = static_cast<float>(p.at[j]) * factor * (static_cast<float>(g.at[j]) - dot);
  }
  if (k + kVec > row.visible) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) y[j] = k + j < row.visible ? y[j] : 0.0f;
  }
  store_vector(out, k, static_cast<int>(args.k_len), !kGeneral || plan.aligned, y);
}

// Without kGeneral: rows aligned, no head mask, no dropout.
template <class T, class Out, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 2)
    softmax_backward_kernel(const __grid_constant__ SoftmaxArgs args, const Plan plan) {
  constexpr int kVec = kVecOf<T>, kSlots = slots_of(kVec, kGeneral);
  __shared__ float partial[2][kMaxThreads / 32];
  Row row;
  if (!find_row(args, row)) return;
  const T *grad = row_of<const T>(args.grad, row), *probs = row_of<const T>(args.probs, row);
  Out* out = row_of<Out>(args.out, row);
  const int k_len = static_cast<int>(args.k_len);
  const int first = static_cast<int>(threadIdx.x) * kVec, step = static_cast<int>(blockDim.x) * kVec;
  // What dropout keeps is scaled as a whole: so the gradient of a lone key is zero exactly.
  const float keep_scale = kGeneral ? args.keep_scale : 1.0f;
  const float factor = args.scale * keep_scale * (kGeneral ? head_factor(args, row) : 1.0f);
  float dot = 0.0f;
  int k = first;
  if (row.visible <= kSlots * step) {
    Pack<T, kVec> g[kSlots], p[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (first + slot * step >= row.visible) break;
      load_gradient<T, kGeneral>(args, plan, row, grad, probs, first + slot * step, g[slot], p[slot]);
      dot = dot_product(g[slot], p[slot], dot);
    }
    dot = reduce_row<Add>(dot, partial[0]);
    // A row without a visible key has no gradient, whatever comes in for it: if that is infinite or NaN, dot is NaN in all
    // of the row's threads, and they look.
    if (dot != dot) {
      float total = 0.0f;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (first + slot * step < row.visible) total = add_up(p[slot], total);
      }
      if (reduce_row<Add>(total, partial[1]) == 0.0f) dot = 0.0f, row.visible = 0;
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (k < row.visible) {
        store_gradient<T, Out, kGeneral>(args, plan, row, out, k, factor, dot, g[slot], p[slot]);
        k += step;
      }
    }
  } else {
    Pack<T, kVec> g, p;
    for (; k < row.visible; k += step) {
      load_gradient<T, kGeneral>(args, plan, row, grad, probs, k, g, p);
      dot = dot_product(g, p, dot);
    }
    dot = reduce_row<Add>(dot, partial[0]);
    if (dot != dot) {  // as above
      float total = 0.0f;
      for (k = first; k < row.visible; k += step) {
        load_vector(probs, k, row.visible, !kGeneral || plan.aligned, p);
        total = add_up(p, total);
      }
      if (reduce_row<Add>(total, partial[1]) == 0.0f) dot = 0.0f, row.visible = 0;
    }
    for (k = first; k < row.visible; k += step) {
      load_gradient<T, kGeneral>(args, plan, row, grad, probs, k, g, p);
      store_gradient<T, Out, kGeneral>(args, plan, row, out, k, factor, dot, g, p);
    }
  }
  for (; k < k_len; k += step) store_zeros<Out, kVec>(out, k, k_len, !kGeneral || plan.aligned);
  if (kGeneral && args.row_dots != nullptr && threadIdx.x == 0) args.row_dots[row.index] = dot * keep_scale;
}

}  // namespace

void softmax_backward_on_gpu(const SoftmaxArgs& args, const Tensor& like) {
  if (is_empty(args)) return;
  const int64_t vec = 16 / size_of(args.probs.dtype);
  const Plan plan{aligned(args.grad, vec, args.k_len) && aligned(args.probs, vec, args.k_len) &&
                      aligned(args.out, vec, args.k_len),
                  false, false};
  const bool general = !plan.aligned || args.head_mask != nullptr || args.rng != nullptr || args.row_dots != nullptr ||
                       args.probs.dtype != args.out.dtype;
  dim3 grid, block;
  make_grid(args, vec, general, grid, block);
  on_device(like, [&](cudaStream_t stream) {
    dispatch(args.probs.dtype, [&](auto in) {
      using T = decltype(in);
      if (!general) return softmax_backward_kernel<T, T, false><<<grid, block, 0, stream>>>(args, plan);
      dispatch(args.out.dtype, [&](auto out) {
        softmax_backward_kernel<T, decltype(out), true><<<grid, block, 0, stream>>>(args, plan);
      });
    });
  });
}

}  // namespace neox
