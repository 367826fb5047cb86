// The masks of the causal softmax, on a row of float32 logits.
#pragma once
#include "cpu/vec_math.h"
#include "softmax_args.h"

namespace neox::NEOX_CPU_ISA {
namespace {

template <class M>
void add_mask(const M* mask, int64_t stride, float* logits, int64_t n) {
  if (stride == 1) {
    for_vectors(n, [&](int64_t i, int64_t count) {
      store_some(logits + i, add(load_some(logits + i, count), load_some(mask + i, count)), count);
    });
    return;
  }
  for (int64_t i = 0; i < n; ++i) store(logits + i, add(load(logits + i, 1), load(mask + i * stride, 1)), 1);
}

void hide(const bool* keep, int64_t stride, float* logits, int64_t n) {
  int64_t i = 0;
  if (stride == 1) {
    const Vec lowest = broadcast(-kInfinity);
    for (; i + Vec::kSize <= n; i += Vec::kSize) store(logits + i, choose(keep + i, load(logits + i), lowest));
  }
  for (; i < n; ++i) {
    if (!keep[i * stride]) logits[i] = -kInfinity;
  }
}

void apply_attn_mask(const AttnMask& mask, int64_t at, float* logits, int64_t n) {
  if (mask.kind == MaskKind::kBool) return hide(static_cast<const bool*>(mask.data) + at, mask.stride_k, logits, n);
  switch (mask.dtype) {
    case Dtype::kFloat32: return add_mask(static_cast<const float*>(mask.data) + at, mask.stride_k, logits, n);
    case Dtype::kBFloat16: return add_mask(static_cast<const bf16*>(mask.data) + at, mask.stride_k, logits, n);
    case Dtype::kFloat16: return add_mask(static_cast<const fp16*>(mask.data) + at, mask.stride_k, logits, n);
  }
}

// Sets what dropout drops of row `row` to zero; x[0] is column `first`.
void drop(const SoftmaxArgs& args, int64_t row, int64_t first, float* x, int64_t n) {
  constexpr int64_t kLanes = 16;  // blocks of random words at once, so that the compiler makes vectors of them
  const uint64_t seed = static_cast<uint64_t>(args.rng[0]);
  const uint32_t offset = static_cast<uint32_t>(args.rng[1]);
  const uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  for (int64_t group = first / 4; 4 * group < first + n; group += kLanes) {
    uint32_t words[4][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Words w = philox(seed, static_cast<uint32_t>(group + lane), low, high, offset);
      for (int64_t word = 0; word < 4; ++word) words[word][lane] = w.at[word];
    }
    for (int64_t i = 0; i < 4 * kLanes; ++i) {
      const int64_t j = 4 * group + i - first;
      if (j >= 0 && j < n && words[i % 4][i / 4] < args.dropout_threshold) x[j] = 0.0f;
    }
  }
}

float head_factor(const SoftmaxArgs& args, int64_t b, int64_t h) {
  if (args.head_mask == nullptr) return 1.0f;
  const int64_t at = b * args.head_mask_stride_batch + h * args.head_mask_stride_head;
  float factor = 0;
  switch (args.head_mask_dtype) {
    case Dtype::kFloat32: factor = static_cast<const float*>(args.head_mask)[at]; break;
    case Dtype::kBFloat16: store(&factor, load(static_cast<const bf16*>(args.head_mask) + at, 1), 1); break;
    case Dtype::kFloat16: store(&factor, load(static_cast<const fp16*>(args.head_mask) + at, 1), 1); break;
  }
  return factor;
}

}  // namespace
}  // namespace neox::NEOX_CPU_ISA
