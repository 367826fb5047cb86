// What one rotary launch needs.
#pragma once
#include "args.h"

namespace neox {

// One of q, k, v: where it is read and where it is written. Strides are in elements; the last dimension is contiguous.
struct RotaryTensor {
  const void* in;
  void* out;
  int64_t in_stride_batch, in_stride_seqlen, in_stride_head;
  int64_t out_stride_batch, out_stride_seqlen, out_stride_head;
  int64_t nheads;
  bool rotate;  // false: copied as it is (v on its way into the cache)
  bool append;  // true: written cache_seqlens[batch] rows further down
};

struct RotaryArgs {
  RotaryTensor tensors[3];
  int32_t ntensors;
  Dtype dtype;

  // Variable-length input (cu_seqlens given) is one row of `seqlen` tokens: then `batch` counts the sequences, and batch
  // strides are not used.
  int64_t batch, seqlen;
  int64_t head_dim, rotary_dim;

  // cos of position p is the row at b * stride_batch + p * stride_position; stride_batch is 0 for tables that all
  // sequences share.
  const void* cos;
  const void* sin;
  int64_t cos_stride_batch, cos_stride_position, sin_stride_batch, sin_stride_position;
  bool table_is_float32;  // otherwise of the dtype of q
  int64_t max_position;

  // Position of token s of sequence b: position_ids[b * stride_batch + s * stride_seqlen] where given, else
  // s + offset + seqlen_offsets[b].
  Indices position_ids, seqlen_offsets, cu_seqlens, cache_seqlens;
  int64_t position_stride_batch, position_stride_seqlen;
  int64_t offset;
  int64_t cache_length;

  bool interleaved;
  bool conjugate;  // rotate by the negative angle: the backward
};

struct RotaryToken {
  int64_t batch, position;
  bool padding;  // past cu_seqlens[batch]: of no sequence, copied as it is
};

// Row `row` of batch entry `batch`; for variable-length input batch is 0 and row the index among all tokens.
[[maybe_unused]] static inline NEOX_HOST_DEVICE RotaryToken locate_token(const RotaryArgs& args, int64_t batch, int64_t row) {
  int64_t s = row;
  if (args.cu_seqlens.data != nullptr) {
    // The last b with cu_seqlens[b] <= row, by bisection: sequences without tokens are stepped over.
    int64_t low = 0, high = args.batch + 1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (index_at(args.cu_seqlens, middle) <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    if (low == args.batch) return {0, 0, true};
    batch = low;
    s = row - index_at(args.cu_seqlens, low);
  }
  if (args.position_ids.data != nullptr) {
    const int64_t b = args.cu_seqlens.data != nullptr ? 0 : batch;
    return {batch, index_at(args.position_ids, b * args.position_stride_batch + row * args.position_stride_seqlen), false};
  }
  // Added without a sign: an offset near the end of the range wraps to a position that is refused.
  uint64_t position = static_cast<uint64_t>(s) + static_cast<uint64_t>(args.offset);
  if (args.seqlen_offsets.data != nullptr) position += static_cast<uint64_t>(index_at(args.seqlen_offsets, batch));
  return {batch, static_cast<int64_t>(position), false};
}

}  // namespace neox
