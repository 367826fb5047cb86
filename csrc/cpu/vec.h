// Float vectors as wide as the instruction set: 16 lanes with AVX-512, 8 with AVX2, one in the portable build (whose loops
// the compiler vectorises itself). bfloat16 and float16 are read into and rounded (to nearest even) out of float32.
//
// Everything lives in the namespace of the instruction set, so that no two sets share a symbol.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace neox::NEOX_CPU_ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#if defined(__AVX512F__)

struct Vec {
  static constexpr int64_t kSize = 16;
  __m512 v;
};

static inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
static inline void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }

static inline __m512 widen(__m256i h, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline __m512 widen(__m256i h, fp16) { return _mm512_cvtph_ps(h); }
static inline __m256i narrow(__m512 v, fp16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256i narrow(__m512 v, bf16) {
#if defined(__AVX512BF16__)
  // The one instruction takes subnormal numbers for zero, so those go the long way.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kSubnormal) == 0, 1)) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}

template <class T> static inline Vec load(const T* p) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{})};
}
template <class T> static inline Vec load(const T* p, int64_t n) {
  return {widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{})};
}
template <class T> static inline void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x.v, T{}));
}
template <class T> static inline void store(T* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x.v, T{}));
}

static inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec mul_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec mul_sub(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
static inline Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xB1)}; }

static inline void copy_bytes(void* to, const void* from, int64_t n) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(t + i, _mm512_loadu_si512(f + i));
  if (i < n) {
    const __mmask64 tail = ~0ull >> (64 - (n - i));
    _mm512_mask_storeu_epi8(t + i, tail, _mm512_maskz_loadu_epi8(tail, f + i));
  }
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int64_t kSize = 8;
  __m256 v;
};

static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }

static inline __m256 widen(__m128i h, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline __m256 widen(__m128i h, fp16) { return _mm256_cvtph_ps(h); }
static inline __m128i narrow(__m256 v, fp16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
static inline __m128i narrow(__m256 v, bf16) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <class T> static inline Vec load(const T* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{})};
}
template <class T> static inline void store(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x.v, T{}));
}
// A part of a vector goes through the stack: AVX2 has no masked moves of 16-bit lanes.
template <class T> static inline Vec load(const T* p, int64_t n) {
  T lanes[Vec::kSize] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T> static inline void store(T* p, Vec x, int64_t n) {
  T lanes[Vec::kSize];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec mul_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec mul_sub(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
static inline Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xB1)}; }

static inline void copy_bytes(void* to, const void* from, int64_t n) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(t + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(f + i)));
  }
  if (i < n) std::memcpy(t + i, f + i, static_cast<size_t>(n - i));
}

#else

struct Vec {
  static constexpr int64_t kSize = 1;
  float v;
};

static inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
static inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline Vec load(const float* p) { return {*p}; }
static inline void store(float* p, Vec x) { *p = x.v; }
static inline Vec load(const bf16* p) { return {as_float(static_cast<uint32_t>(p->bits) << 16)}; }
static inline void store(bf16* p, Vec x) {
  const uint32_t bits = as_bits(x.v);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  p->bits = static_cast<uint16_t>((x.v != x.v ? bits | 0x400000 : rounded) >> 16);
}
// float16 by float arithmetic: scaling moves the exponents of one format onto the other, and adding 2^k rounds a
// subnormal to its place.
static inline Vec load(const fp16* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(p->bits & 0x7fff) << 13;
  const float scaled = as_float(rest) * 0x1p112f;
  const uint32_t bits = (p->bits & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : as_bits(scaled);
  return {as_float(bits | sign)};
}
static inline void store(fp16* p, Vec x) {
  const uint32_t sign = as_bits(x.v) & 0x80000000u;
  const uint32_t magnitude = as_bits(x.v) ^ sign;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x47800000) {  // 2^16: above every float16
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: a subnormal, in steps of 2^-24
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | (sign >> 16));
}
// One lane is a whole vector: there are no parts.
template <class T> static inline Vec load(const T* p, int64_t) { return load(p); }
template <class T> static inline void store(T* p, Vec x, int64_t) { store(p, x); }

static inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
// The build forbids the compiler to fuse by itself (setup.py), so processors that always can are asked to.
#if defined(__FP_FAST_FMAF)
static inline Vec mul_add(Vec a, Vec b, Vec c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
static inline Vec mul_sub(Vec a, Vec b, Vec c) { return {__builtin_fmaf(a.v, b.v, -c.v)}; }
#else
static inline Vec mul_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
static inline Vec mul_sub(Vec a, Vec b, Vec c) { return {a.v * b.v - c.v}; }
#endif
template <class V> V swap_pairs(V);  // declared for `if constexpr`: one lane has no pairs

static inline void copy_bytes(void* to, const void* from, int64_t n) { std::memcpy(to, from, static_cast<size_t>(n)); }

#endif

}  // namespace neox::NEOX_CPU_ISA
