// What one launch of the causal softmax, or of its backward, needs.
#pragma once
#include "args.h"

namespace neox {

// A tensor over (batch, nheads, q_len, k_len). Strides are in elements, 0 where it broadcasts.
struct Scores {
  void* data;
  Dtype dtype;
  int64_t stride_batch, stride_head, stride_q;  // the last dimension is contiguous
};

enum class MaskKind : int32_t { kNone, kBool, kFloat };

struct AttnMask {
  const void* data;
  MaskKind kind;
  Dtype dtype;  // of kFloat
  int64_t stride_batch, stride_head, stride_q, stride_k;
};

struct SoftmaxArgs {
  int64_t batch, nheads, q_len, k_len;
  float scale;
  bool causal;  // query i sees key j only where j <= i + k_len - q_len

  // Forward: scores to out, and to probs (no data: not wanted) the probabilities before head mask and dropout.
  // Backward: the gradient `grad` of out, and the saved probs, to the gradient `out` of the scores.
  Scores scores, grad, probs, out;

  const bool* key_padding;  // (batch, k_len), true for the keys to see; nullptr: all
  int64_t key_padding_stride_batch, key_padding_stride_k;
  AttnMask attn_mask;

  const void* head_mask;  // (batch, nheads); nullptr: none
  Dtype head_mask_dtype;
  int64_t head_mask_stride_batch, head_mask_stride_head;

  // Dropout: element (row, column) stays if word `column % 4` of the Philox block with the counter (column / 4, row,
  // offset) is not below the threshold. `rng` points to seed and offset, on the device; nullptr: no dropout.
  const int64_t* rng;
  uint32_t dropout_threshold;
  float keep_scale;

  float* row_dots;  // backward: where (batch * nheads * q_len) sums over the gradient of the head mask go; may be nullptr
};

// How many keys row q sees under the causal rule.
[[maybe_unused]] static inline NEOX_HOST_DEVICE int64_t visible_keys(const SoftmaxArgs& args, int64_t q) {
  if (!args.causal) return args.k_len;
  const int64_t n = q + args.k_len - args.q_len + 1;
  return n < 0 ? 0 : n;
}

struct Words {
  uint32_t at[4];
};

// Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011).
[[maybe_unused]] static inline NEOX_HOST_DEVICE Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p2 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p2);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace neox
