// Neighbouring elements in registers, moved by wide accesses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace neox {
namespace {

template <int kBytes>
struct Bytes;
template <>
struct Bytes<16> { using type = uint4; };
template <>
struct Bytes<8> { using type = uint2; };
template <>
struct Bytes<4> { using type = uint32_t; };
template <>
struct Bytes<2> { using type = uint16_t; };

// kVec neighbouring elements, moved by accesses of up to 16 bytes.
template <class T, int kVec>
union Pack {
  static constexpr int kBytes = sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16;
  static constexpr int kAccesses = sizeof(T) * kVec / kBytes;
  using Access = typename Bytes<kBytes>::type;

  Access access[kAccesses];
  T at[kVec];

  __device__ Pack() {}
  __device__ explicit Pack(const T* from) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) access[i] = reinterpret_cast<const Access*>(from)[i];
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) reinterpret_cast<Access*>(to)[i] = access[i];
  }
};

// Two at a time: one conversion instruction rounds and packs both.
__device__ inline void round_pair(float a, float b, float* out) { out[0] = a, out[1] = b; }
__device__ inline void round_pair(float a, float b, __nv_bfloat16* out) {
  *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(a, b);
}
__device__ inline void round_pair(float a, float b, __half* out) {
  *reinterpret_cast<__half2*>(out) = __floats2half2_rn(a, b);
}

}  // namespace
}  // namespace neox
