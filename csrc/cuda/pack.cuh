// Neighbouring elements in registers, moved by wide accesses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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

// The bits of kVec elements as words. As elements, the compiler keeps each of 16 bits in a register of its own wherever they
// pass a branch, and takes them apart as soon as they arrive.
template <class T, int kVec>
struct Packed {
  static constexpr int kBytes = sizeof(T) * kVec;
  using Word = std::conditional_t<kBytes >= 4, uint32_t, uint16_t>;
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(Word));
  Pack<Word, kCount> words;

  __device__ Packed() {}
  __device__ explicit Packed(const T* from) : words(reinterpret_cast<const Word*>(from)) {}
  __device__ void store(T* to) const { words.store(reinterpret_cast<Word*>(to)); }
};

__device__ inline float2 floats_of(uint32_t word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ inline float2 floats_of(uint32_t word, __half) { return __half22float2(reinterpret_cast<const __half2&>(word)); }
__device__ inline float float_of(uint16_t bits, __nv_bfloat16) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline float float_of(uint16_t bits, __half) { return __half2float(__ushort_as_half(bits)); }

template <class T, int kVec>
__device__ void to_floats(const Packed<T, kVec>& from, float* out) {
#pragma unroll
  for (int i = 0; i < Packed<T, kVec>::kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(from.words.at[i]);
    } else if constexpr (kVec == 1) {
      out[0] = float_of(from.words.at[0], T());
    } else {
      const float2 pair = floats_of(from.words.at[i], T());
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int kVec>
__device__ void from_floats(const float* from, Packed<T, kVec>& out) {
#pragma unroll
  for (int i = 0; i < Packed<T, kVec>::kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.words.at[i] = __float_as_uint(from[i]);
    } else if constexpr (kVec == 1) {
      const T rounded = static_cast<T>(from[0]);
      out.words.at[0] = reinterpret_cast<const uint16_t&>(rounded);
    } else {
      T pair[2];
      round_pair(from[2 * i], from[2 * i + 1], pair);
      out.words.at[i] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
}

}  // namespace
}  // namespace neox
