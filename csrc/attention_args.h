// What one call of causal attention needs.
#pragma once
#include "args.h"

namespace neox {

// (batch, seqlen, nheads, head_dim). Strides are in elements; the last dimension is contiguous.
struct Heads {
  const void* data;
  int64_t stride_batch, stride_seq, stride_head;
};

struct AttentionArgs {
  int64_t batch, nheads, q_len, k_len, head_dim;
  Heads q, k, v;
  void* out;  // contiguous
  Dtype dtype;
  double scale;
};

constexpr int64_t kBlock = 32;  // queries, keys and columns that are multiplied at a time
constexpr int64_t kStep = 16;   // blocks of keys between two looks at the largest score

[[maybe_unused]] static inline int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Elements of four bytes that a thread works in, whatever the dtype.
[[maybe_unused]] static inline int64_t scratch_of(const AttentionArgs& args) {
  const int64_t wide = blocks_of(args.head_dim), keys = blocks_of(args.k_len);
  return kBlock * kBlock * (2 * wide + 2 * wide * keys + 2 * kStep);
}

}  // namespace neox
