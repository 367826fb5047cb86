// Rotary in place. A thread owns pairs of columns and writes them where it read them: threads that own columns alone would
// overwrite what others still read. Columns that are not rotated are not touched.
#pragma once
#include "cuda/rotary_tokens.cuh"

namespace neox {
namespace {

constexpr int kPairedHeadsAtOnce = 2;

// Pairs of columns of one thread. Neighbours come in one access; halves in two, of the same number of elements.
template <int kVec, bool kInterleaved>
constexpr int kPairsOf = kInterleaved && kVec > 1 ? kVec / 2 : kVec;

// A pair is a from the one access and b from the other, or two neighbours of the only one.
template <class T, int kVec, int kLoads, int kPairs>
__device__ void rotate(const Pack<T, kVec> (&in)[kLoads], const float (&c)[kPairs], const float (&s)[kPairs],
                       Pack<T, kVec> (&out)[kLoads]) {
  constexpr bool kNeighbours = kLoads == 1;
  float a[kPairs], b[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float u = static_cast<float>(kNeighbours ? in[0].at[2 * i] : in[0].at[i]);
    const float v = static_cast<float>(kNeighbours ? in[0].at[2 * i + 1] : in[kLoads - 1].at[i]);
    // Which product is fused is said here: left to the compiler, it differs between widths, and so would results.
    a[i] = __fmaf_rn(u, c[i], -__fmul_rn(v, s[i]));
    b[i] = __fmaf_rn(v, c[i], __fmul_rn(u, s[i]));
  }
  if constexpr (kNeighbours) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) round_pair(a[i], b[i], &out[0].at[2 * i]);
  } else if constexpr (kPairs > 1) {
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      round_pair(a[i], a[i + 1], &out[0].at[i]);
      round_pair(b[i], b[i + 1], &out[1].at[i]);
    }
  } else {
    out[0].at[0] = static_cast<T>(a[0]);
    out[1].at[0] = static_cast<T>(b[0]);
  }
}

template <class T, int kVec, bool kInterleaved>
__device__ void rotate_heads(const RotaryTensor& tensor, T* x, int64_t rotary_dim, int pair,
                             const float (&c)[kPairsOf<kVec, kInterleaved>],
                             const float (&s)[kPairsOf<kVec, kInterleaved>]) {
  constexpr int kPairs = kPairsOf<kVec, kInterleaved>;
  constexpr int kLoads = 2 * kPairs / kVec;
  const int64_t second = kInterleaved ? 1 : rotary_dim / 2;
  const int64_t first = kInterleaved ? 2 * pair : pair;
  x += first + threadIdx.y * tensor.in_stride_head;
  const int64_t step = blockDim.y * tensor.in_stride_head;
  const uint32_t nheads = static_cast<uint32_t>(tensor.nheads);
#pragma unroll 1
  for (uint32_t head = threadIdx.y; head < nheads; head += kPairedHeadsAtOnce * blockDim.y) {
    Pack<T, kVec> in[kPairedHeadsAtOnce][kLoads];
#pragma unroll
    for (int h = 0; h < kPairedHeadsAtOnce; ++h) {
      if (head + h * blockDim.y >= nheads) break;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) in[h][i] = Pack<T, kVec>(x + h * step + i * second);
    }
#pragma unroll
    for (int h = 0; h < kPairedHeadsAtOnce; ++h) {
      if (head + h * blockDim.y >= nheads) break;
      Pack<T, kVec> out[kLoads];
      rotate<T, kVec, kLoads>(in[h], c, s, out);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) out[i].store(x + h * step + i * second);
    }
    x += kPairedHeadsAtOnce * step;
  }
}

template <class T, int kVec, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 6) rotary_pairs_kernel(const __grid_constant__ RotaryArgs args) {
  constexpr int kPairs = kPairsOf<kVec, kInterleaved>;
  Place place;
  if (!find_place(args, place)) return;
  const RotaryToken token = locate_token(args, place.batch, place.row);
  if (token.padding) return;
  const int pairs = static_cast<int>(args.rotary_dim / 2);
#pragma unroll 1
  for (int pair = static_cast<int>(threadIdx.x) * kPairs; pair < pairs; pair += static_cast<int>(blockDim.x) * kPairs) {
    float c[kPairs], s[kPairs];
    load_cos_sin<T>(args, token, pair, c, s);
#pragma unroll 1
    for (int t = 0; t < args.ntensors; ++t) {
      const T* x;
      T* y;
      if (!find_rows(args, args.tensors[t], place, x, y)) continue;
      rotate_heads<T, kVec, kInterleaved>(args.tensors[t], y, args.rotary_dim, pair, c, s);
    }
  }
}

}  // namespace
}  // namespace neox
