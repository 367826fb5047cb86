// What softmax and GELU need of vectors beyond vec.h: sums, extremes, masks and the exponential. Of max and min the second
// argument is the result where either is NaN.
#pragma once
#include "cpu/vec.h"

namespace neox::NEOX_CPU_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2E = 1.4426950408889634;
// Whether mul_add rounds once.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
// 2^r = 1 + r q(r) for |r| <= 1/2, relative error 2e-8: a weighted least squares fit of ours.
constexpr float kExp2[6] = {0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843785f, 0.00133989262f, 0.000153533198f};
// Below it 2^x counts as zero: so small beside the largest element of a row, which is about 1, it never shows.
constexpr float kSmallestExponent = -126.0f;

#if defined(__AVX512F__)

static inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
static inline float max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// The first n lanes of a, then those of b.
static inline Vec first_of(Vec a, int64_t n, Vec b) { return {_mm512_mask_mov_ps(b.v, first_lanes(n), a.v)}; }
// a where keep is true, else b.
static inline Vec choose(const bool* keep, Vec a, Vec b) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keep));
  return {_mm512_mask_mov_ps(b.v, _mm_test_epi8_mask(bytes, bytes), a.v)};
}
static inline Vec scale_by_power(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }
static inline Vec round_to_int(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline Vec zero_below(Vec x, float bound, Vec value) {
  // Not-less-than holds for NaN too.
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_NLT_UQ), value.v)};
}

#elif defined(__AVX2__)

static inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
static inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline float sum(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float max(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline Vec first_of(Vec a, int64_t n, Vec b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(first))};
}
static inline Vec choose(const bool* keep, Vec a, Vec b) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(keep)));
  const __m256i kept = _mm256_cmpgt_epi32(lanes, _mm256_setzero_si256());
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(kept))};
}
static inline Vec scale_by_power(Vec p, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
static inline Vec round_to_int(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline Vec zero_below(Vec x, float bound, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(bound), _CMP_NLT_UQ), value.v)};
}

#else

typedef uint8_t Bytes __attribute__((vector_size(4)));

static inline Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
static inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
static inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
static inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
static inline Vec max(Vec a, Vec b) { return {(Floats)blend(a.v > b.v, (Ints)a.v, (Ints)b.v)}; }
static inline Vec min(Vec a, Vec b) { return {(Floats)blend(a.v < b.v, (Ints)a.v, (Ints)b.v)}; }
static inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
static inline float max(Vec a) {
  const Vec two = max(a, {Floats{a.v[2], a.v[3], a.v[2], a.v[3]}});
  return two.v[0] > two.v[1] ? two.v[0] : two.v[1];
}
static inline Vec first_of(Vec a, int64_t n, Vec b) {
  const uint32_t count = static_cast<uint32_t>(n);
  return {(Floats)blend(Ints{0, 1, 2, 3} < count, (Ints)a.v, (Ints)b.v)};
}
static inline Vec choose(const bool* keep, Vec a, Vec b) {
  Bytes bytes;
  std::memcpy(&bytes, keep, sizeof bytes);
  return {(Floats)blend(__builtin_convertvector(bytes, Ints) != 0, (Ints)a.v, (Ints)b.v)};
}
static inline Vec scale_by_power(Vec p, Vec n) {
  // n + 127 belongs in the bits of the exponent; adding 2^23 puts a whole number into the last bits of a float.
  return {p.v * (Floats)((Ints)(n.v + (8388608.0f + 127.0f)) << 23)};
}
// Adding 1.5 * 2^23 leaves no bits behind the point.
static inline Vec round_to_int(Vec x) { return {(x.v + 12582912.0f) - 12582912.0f}; }
static inline Vec zero_below(Vec x, float bound, Vec value) {
  return {(Floats)(~(Ints)(x.v < bound) & (Ints)value.v)};
}

#endif

// 2^(x + x * extra) for x below 128 and an `extra` smaller than a rounding; NaN stays NaN.
static inline Vec exp2(Vec x, Vec extra) {
  const Vec n = round_to_int(x), r = mul_add(x, extra, sub(x, n));
  Vec q = broadcast(kExp2[5]);
  for (int i = 4; i >= 0; --i) q = mul_add(q, r, broadcast(kExp2[i]));
  return zero_below(x, kSmallestExponent, scale_by_power(mul_add(q, r, broadcast(1.0f)), n));
}

// n lanes, whole vectors where n is a constant.
template <class T>
static inline Vec load_some(const T* p, int64_t n) { return n == Vec::kSize ? load(p) : load(p, n); }
template <class T>
static inline void store_some(T* p, Vec x, int64_t n) { n == Vec::kSize ? store(p, x) : store(p, x, n); }

// Calls step(i, kSize) for every whole vector of n elements, then step(i, rest) for what is left.
template <class Step>
static inline void for_vectors(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) step(i, Vec::kSize);
  if (i < n) step(i, n - i);
}

}  // namespace neox::NEOX_CPU_ISA
