// Causal softmax on the GPU.
//
// Up to kSlots accesses of a row stay in a thread's registers, so that memory is read once and written once. A longer
// row goes by twice: for its maximum and its sum, which each thread keeps for itself and rescales as its maximum grows,
// and to be written. Nothing above the diagonal is read but the rest of the access that the diagonal cuts.
#include "cuda/softmax.cuh"

#include <type_traits>

namespace neox {

void softmax_backward_on_gpu(const SoftmaxArgs& args, const Tensor& like);  // softmax_backward.cu

namespace {

// e^x for x <= 0. The hardware's own errs by up to two units in the last place, and its argument is rounded once more: for
// a float32 result that would leave the error budget.
template <bool kAccurate>
__device__ float exponential(float x) {
  if constexpr (kAccurate) {
    // e^x = 2^n e^r, ln 2 in two parts of which the first has few bits, and e^r = 1 + r + r^2 q(r) to 4e-9.
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer, in its last bits
    const float y = x < -87.0f ? -87.0f : x, shifted = __fmaf_rn(y, 1.44269504f, kRound), n = shifted - kRound;
    const float r = __fmaf_rn(n, 2.12194440e-4f, __fmaf_rn(n, -0.693359375f, y));
    float q = __fmaf_rn(r, 0.0013814540f, 0.0083687454f);
    q = __fmaf_rn(__fmaf_rn(__fmaf_rn(q, r, 0.041668389f), r, 0.16666521f), r, 0.49999994f);
    const float power = __int_as_float((__float_as_int(shifted) << 23) + 0x3f800000);
    return x < -87.0f ? 0.0f : __fmaf_rn(q, r * r, r + 1.0f) * power;  // so small, it never shows beside 1
  } else {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
    return power;
  }
}

template <class M, int kVec>
__device__ void add_mask(const void* data, int64_t first, int64_t stride_k, int k, int end, bool whole, float scale,
                         float (&x)[kVec]) {
  const M* mask = static_cast<const M*>(data) + first;
  if (whole) {
    const Pack<M, kVec> pack(mask + k);
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] = __fmaf_rn(x[j], scale, static_cast<float>(pack.at[j]));
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    if (k + j < end) x[j] = __fmaf_rn(x[j], scale, static_cast<float>(mask[static_cast<int64_t>(k + j) * stride_k]));
  }
}

template <int kVec>
__device__ void hide(const bool* keep, int64_t stride_k, int k, int end, bool whole, float (&x)[kVec]) {
  if (whole) {
    const Pack<uint8_t, kVec> pack(reinterpret_cast<const uint8_t*>(keep) + k);
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] = pack.at[j] != 0 ? x[j] : -INFINITY;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    if (k + j < end && !keep[static_cast<int64_t>(k + j) * stride_k]) x[j] = -INFINITY;
  }
}

// scale * scores + masks from column k on, -inf where a key is not visible.
template <class In, bool kGeneral, int kVec>
__device__ void load_logits(const SoftmaxArgs& args, const Plan& plan, const Row& row, const In* scores, int k,
                            float (&x)[kVec]) {
  Pack<In, kVec> pack;
  load_vector(scores, k, row.visible, !kGeneral || plan.aligned, pack);
  const AttnMask& mask = args.attn_mask;
  const bool added = kGeneral && mask.kind == MaskKind::kFloat;
#pragma unroll
  for (int j = 0; j < kVec; ++j) x[j] = static_cast<float>(pack.at[j]) * (added ? 1.0f : args.scale);
  if constexpr (kGeneral) {
    if (mask.kind != MaskKind::kNone) {
      const int64_t first = row.b * mask.stride_batch + row.h * mask.stride_head + row.q * mask.stride_q;
      const auto add = [&](auto type) {
        add_mask<decltype(type)>(mask.data, first, mask.stride_k, k, row.visible, plan.mask_aligned, args.scale, x);
      };
      if (mask.kind == MaskKind::kBool) {
        hide(static_cast<const bool*>(mask.data) + first, mask.stride_k, k, row.visible, plan.mask_aligned, x);
      } else if (mask.dtype == Dtype::kFloat32) {
        add(float{});
      } else if (mask.dtype == Dtype::kBFloat16) {
        add(__nv_bfloat16{});
      } else {
        add(__half{});
      }
    }
    if (args.key_padding != nullptr) {
      hide(args.key_padding + row.b * args.key_padding_stride_batch, args.key_padding_stride_k, k, row.visible,
           plan.padding_aligned, x);
    }
  }
  if (k + kVec > row.visible) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] = k + j < row.visible ? x[j] : -INFINITY;
  }
}

// The factors of a row's exponentials that make its probabilities and its result.
struct Factors {
  float probs, out;
};

template <class Out, bool kGeneral, int kVec>
__device__ void store_probs(const SoftmaxArgs& args, const Plan& plan, const Row& row, Out* out, Out* probs, int k,
                            const Factors& factors, const float (&exponentials)[kVec]) {
  const bool whole = !kGeneral || plan.aligned;
  const int k_len = static_cast<int>(args.k_len);
  float y[kVec];
  const auto scale = [&](float factor) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) y[j] = exponentials[j] * factor;
    if (k + kVec > row.visible) {  // in a row of NaN, what is hidden is 0 * NaN by now
#pragma unroll
      for (int j = 0; j < kVec; ++j) y[j] = k + j < row.visible ? y[j] : 0.0f;
    }
  };
  if constexpr (kGeneral) {
    if (probs != nullptr) {
      scale(factors.probs);
      store_vector(probs, k, k_len, whole, y);
    }
  }
  scale(factors.out);
  if constexpr (kGeneral) {
    if (args.rng != nullptr) {
      const uint32_t bits = dropped<kVec>(args, row, k);
#pragma unroll
      for (int j = 0; j < kVec; ++j) y[j] = (bits >> j & 1) != 0 ? 0.0f : y[j];
    }
  }
  store_vector(out, k, k_len, whole, y);
}

// exp(x - most): a row of -inf alone counts as having the maximum 0, so that its exponentials are all 0.
template <bool kAccurate, int kVec>
__device__ float exponentials(float (&x)[kVec], float most) {
  const float shift = most == -INFINITY ? 0.0f : most;
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    // The difference comes first, for logits of -3.4e38, as masks have them, would overflow when multiplied.
    x[j] = exponential<kAccurate>(x[j] - shift);
    sum += x[j];
  }
  return sum;
}

template <int kVec>
__device__ float largest(const float (&x)[kVec]) {
  float most = x[0];
#pragma unroll
  for (int j = 1; j < kVec; ++j) most = fmaxf(most, x[j]);
  return most;
}

__device__ Factors factors_of(const SoftmaxArgs& args, const Row& row, float total, bool general) {
  if (total == 0.0f) return {0.0f, 0.0f};
  return {1.0f / total, general ? head_factor(args, row) * args.keep_scale / total : 1.0f / total};
}

// Without kGeneral: rows aligned, no mask, no dropout, and only the result is wanted.
template <class In, class Out, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 2) softmax_kernel(const __grid_constant__ SoftmaxArgs args, const Plan plan) {
  constexpr bool kAccurate = std::is_same_v<Out, float>;
  constexpr int kVec = kVecOf<In>, kSlots = slots_of(kVec, kGeneral);
  __shared__ float partial[2][kMaxThreads / 32];
  Row row;
  if (!find_row(args, row)) return;
  const In* scores = row_of<const In>(args.scores, row);
  Out* out = row_of<Out>(args.out, row);
  Out* probs = kGeneral && args.probs.data != nullptr ? row_of<Out>(args.probs, row) : nullptr;
  const int k_len = static_cast<int>(args.k_len);
  const int first = static_cast<int>(threadIdx.x) * kVec, step = static_cast<int>(blockDim.x) * kVec;
  int k = first;
  if (row.visible <= kSlots * step) {
    float x[kSlots][kVec], most = -INFINITY, total = 0.0f;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (first + slot * step >= row.visible) break;
      load_logits<In, kGeneral>(args, plan, row, scores, first + slot * step, x[slot]);
      most = fmaxf(most, largest(x[slot]));
    }
    most = reduce_row<Max>(most, partial[0]);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (first + slot * step < row.visible) total += exponentials<kAccurate>(x[slot], most);
    }
    total = reduce_row<Add>(total, partial[1]);
    const Factors factors = factors_of(args, row, total, kGeneral);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (k < row.visible) {
        store_probs<Out, kGeneral>(args, plan, row, out, probs, k, factors, x[slot]);
        k += step;
      }
    }
  } else {
    float x[kVec], most = -INFINITY, total = 0.0f;
    for (; k < row.visible; k += step) {
      load_logits<In, kGeneral>(args, plan, row, scores, k, x);
      const float before = most;
      most = fmaxf(most, largest(x));
      const float unchanged = most == -INFINITY ? 0.0f : before;  // no difference of two infinities
      total = __fmaf_rn(total, exponential<kAccurate>(unchanged - (most == -INFINITY ? 0.0f : most)),
                        exponentials<kAccurate>(x, most));
    }
    const float own = most;
    most = reduce_row<Max>(most, partial[0]);
    total *= own == -INFINITY ? 1.0f : exponential<kAccurate>(own - most);
    total = reduce_row<Add>(total, partial[1]);
    const Factors factors = factors_of(args, row, total, kGeneral);
    for (k = first; k < row.visible; k += step) {
      load_logits<In, kGeneral>(args, plan, row, scores, k, x);
      exponentials<kAccurate>(x, most);
      store_probs<Out, kGeneral>(args, plan, row, out, probs, k, factors, x);
    }
  }
  for (; k < k_len; k += step) {
    store_zeros<Out, kVec>(out, k, k_len, !kGeneral || plan.aligned);
    if (kGeneral && probs != nullptr) store_zeros<Out, kVec>(probs, k, k_len, plan.aligned);
  }
}

bool aligned(const AttnMask& mask, int64_t vec) {
  const int64_t size = mask.kind == MaskKind::kBool ? 1 : size_of(mask.dtype);
  return mask.stride_k == 1 && aligned(mask.data, std::min<int64_t>(vec * size, 16), size,
                                       {mask.stride_batch, mask.stride_head, mask.stride_q});
}

void forward(const SoftmaxArgs& args, const Tensor& like) {
  if (is_empty(args)) return;
  const int64_t vec = 16 / size_of(args.scores.dtype);
  const bool rows_aligned = aligned(args.scores, vec, args.k_len) && aligned(args.out, vec, args.k_len) &&
                            aligned(args.probs, vec, args.k_len);
  const bool padding_aligned = rows_aligned && args.key_padding_stride_k == 1 &&
                               aligned(args.key_padding, vec, 1, {args.key_padding_stride_batch});
  const Plan plan{rows_aligned, rows_aligned && aligned(args.attn_mask, vec), padding_aligned};
  const bool general = !plan.aligned || args.key_padding != nullptr || args.attn_mask.kind != MaskKind::kNone ||
                       args.head_mask != nullptr || args.rng != nullptr || args.scores.dtype != args.out.dtype;
  dim3 grid, block;
  make_grid(args, vec, general, grid, block);
  on_device(like, [&](cudaStream_t stream) {
    dispatch(args.scores.dtype, [&](auto in) {
      using In = decltype(in);
      if (!general) return softmax_kernel<In, In, false><<<grid, block, 0, stream>>>(args, plan);
      dispatch(args.out.dtype, [&](auto out) {
        softmax_kernel<In, decltype(out), true><<<grid, block, 0, stream>>>(args, plan);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CUDA, m) { register_softmax<forward, softmax_backward_on_gpu>(m); }

}  // namespace neox
