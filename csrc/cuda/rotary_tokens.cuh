// What the rotary kernels on the GPU share: the token of a thread, its cos and sin, its rows.
//
// A block takes blockDim.z tokens. The threads of a token are blockDim.x pieces of a head's columns by blockDim.y heads: each
// reads its piece of cos and sin once, keeps it in registers, and walks over the heads of q and k.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/pack.cuh"
#include "rotary_ops.h"

namespace neox {
namespace {

constexpr int kThreads = 128;  // of a block, at most

// Rows of a batch; variable-length input is one.
__host__ __device__ inline int64_t rows_of(const RotaryArgs& args) {
  return args.cu_seqlens.data != nullptr ? 1 : args.batch;
}

// Where a thread's token is.
struct Place {
  uint32_t batch;
  int64_t row;
};

// False where there is no such token.
__device__ inline bool find_place(const RotaryArgs& args, Place& place) {
  place.row = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  // The second and third dimensions of a grid end at 65535, so a larger batch takes both.
  place.batch = blockIdx.z * gridDim.y + blockIdx.y;
  return place.row < args.seqlen && place.batch < rows_of(args);
}

// The token's rows of a tensor; false where a cache has no room for it.
template <class T>
__device__ bool find_rows(const RotaryArgs& args, const RotaryTensor& tensor, const Place& place, const T*& x, T*& y) {
  int64_t out_row = place.row;
  if (tensor.append) {
    out_row += index_at(args.cache_seqlens, place.batch);
    if (out_row < 0 || out_row >= args.cache_length) return false;
  }
  x = static_cast<const T*>(tensor.in) + place.batch * tensor.in_stride_batch + place.row * tensor.in_stride_seqlen;
  y = static_cast<T*>(tensor.out) + place.batch * tensor.out_stride_batch + out_row * tensor.out_stride_seqlen;
  return true;
}

template <class Table, int kPairs>
__device__ void load_floats(const void* table, int64_t at, float (&out)[kPairs]) {
  const Pack<Table, kPairs> pack(static_cast<const Table*>(table) + at);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) out[i] = static_cast<float>(pack.at[i]);
}

// cos and sin of the pairs from `pair` on: NaN for a position outside the tables, which are not read there.
template <class T, int kPairs>
__device__ void load_cos_sin(const RotaryArgs& args, const RotaryToken& token, int pair, float (&c)[kPairs],
                             float (&s)[kPairs]) {
  if (token.position < 0 || token.position >= args.max_position) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) c[i] = s[i] = __int_as_float(0x7fc00000);
    return;
  }
  const int64_t cos_at = token.batch * args.cos_stride_batch + token.position * args.cos_stride_position + pair;
  const int64_t sin_at = token.batch * args.sin_stride_batch + token.position * args.sin_stride_position + pair;
  if (args.table_is_float32) {
    load_floats<float>(args.cos, cos_at, c);
    load_floats<float>(args.sin, sin_at, s);
  } else {
    load_floats<T>(args.cos, cos_at, c);
    load_floats<T>(args.sin, sin_at, s);
  }
  if (args.conjugate) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) s[i] = -s[i];
  }
}

}  // namespace
}  // namespace neox
