// What one launch of the varlen ops needs. Rows are moved as bytes, so no dtype matters but the mask's.
#pragma once
#include "args.h"

namespace neox {

// A tensor whose rows are gathered. Row r begins at (r / seqlen) * stride_batch + (r % seqlen) * stride_seqlen and is
// `blocks` pieces of memory of `block_bytes`, evenly spaced: the heads of a packed projection or of a transposed tensor; a
// row that lies in one piece has one block. Strides are in bytes. `out` is contiguous.
struct RowTensor {
  const char* in;
  char* out;
  int64_t seqlen, stride_batch, stride_seqlen;
  int64_t blocks, stride_block, block_bytes;
};

constexpr int32_t kMaxTensors = 8;  // of one launch

// Row r of every result is row indices[r] of its tensor, or zero where that is no row.
struct GatherArgs {
  RowTensor tensors[kMaxTensors];
  int32_t ntensors;
  Indices indices;
  int64_t rows_in, rows_out;
};

// Values of a mask by their bits. What is neither 0 nor 1 counts as a token, and as invalid.
struct MaskArgs {
  const void* mask;
  int64_t batch, seqlen, stride_batch, stride_seqlen;  // strides in elements
  int32_t element_size;
  uint64_t one, minus_zero;  // how its dtype writes them; 0 for no minus zero

  int64_t capacity, max_seqlen;
  int64_t* indices;     // (capacity,)
  int32_t* cu_seqlens;  // (batch + 1,)
  int32_t* inverse;     // (batch, seqlen)
  int64_t* facts;       // (3,): tokens, the longest sequence, invalid values
};

struct MaskValue {
  bool token, invalid;
};

template <class Bits>
[[maybe_unused]] static inline NEOX_HOST_DEVICE MaskValue mask_value(const MaskArgs& args, int64_t b, int64_t s) {
  const uint64_t bits = static_cast<const Bits*>(args.mask)[b * args.stride_batch + s * args.stride_seqlen];
  const bool token = bits != 0 && bits != args.minus_zero;
  return {token, token && bits != args.one};
}

}  // namespace neox
