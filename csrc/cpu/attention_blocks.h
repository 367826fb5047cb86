// Blocks of 32 x 32 elements: their products, in float32 by AVX-512 and in bfloat16 by AMX, and how matrices are cut into
// them. Blocks lie one behind the other and are padded with zeros, so that a product needs no strides and has no rests.
#pragma once
#include "attention_args.h"
#include "cpu/vec_math.h"

#if defined(__AVX512F__)
namespace neox::NEOX_CPU_ISA {

constexpr int64_t kArea = kBlock * kBlock;
constexpr int64_t kLanes = Vec::kSize;

// out (+)= sum over `count` blocks of a[i] b[i * stride].
static inline void multiply(const float* a, const float* b, int64_t stride, int64_t count, float* out, bool accumulate) {
  constexpr int kRows = 8, kVecs = kBlock / kLanes;  // 16 sums hide the latency of their additions
  for (int64_t row = 0; row < kBlock; row += kRows) {
    Vec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVecs; ++c) {
        sums[r][c] = accumulate ? load(out + (row + r) * kBlock + c * kLanes) : broadcast(0.0f);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* left = a + i * kArea + row * kBlock;
      const float* right = b + i * stride * kArea;
      for (int64_t k = 0; k < kBlock; ++k) {
        Vec columns[kVecs];
        for (int c = 0; c < kVecs; ++c) columns[c] = load(right + k * kBlock + c * kLanes);
        for (int r = 0; r < kRows; ++r) {
          const Vec x = broadcast(left[r * kBlock + k]);
          for (int c = 0; c < kVecs; ++c) sums[r][c] = mul_add(x, columns[c], sums[r][c]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVecs; ++c) store(out + (row + r) * kBlock + c * kLanes, sums[r][c]);
    }
  }
}

static inline void begin_products(float) {}
static inline void end_products(float) {}

#if defined(__AVX512BF16__)
#define NEOX_AMX __attribute__((target("amx-tile,amx-bf16")))

// GCC's intrinsics do not say which memory they read: without this it may drop what was stored there.
static inline void memory_is_read() { __asm__ volatile("" ::: "memory"); }

// The same of bfloat16: of b, rows 2i and 2i + 1 lie interleaved, and the left half of the columns before the right.
NEOX_AMX static inline void multiply(const bf16* a, const bf16* b, int64_t stride, int64_t count, float* out, bool accumulate) {
  constexpr int64_t kHalf = kBlock / 2, kOutRow = kBlock * 4, kRow = kBlock * 2;
  float *out1 = out + kHalf, *out2 = out + kHalf * kBlock, *out3 = out2 + kHalf;
  memory_is_read();
  if (accumulate) {
    _tile_loadd(0, out, kOutRow);
    _tile_loadd(1, out1, kOutRow);
    _tile_loadd(2, out2, kOutRow);
    _tile_loadd(3, out3, kOutRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; ++i) {
    const bf16 *above = a + i * kArea, *below = above + kArea / 2;
    const bf16 *left = b + i * stride * kArea, *right = left + kArea / 2;
    _tile_loadd(4, above, kRow);
    _tile_loadd(6, left, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right, kRow);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, below, kRow);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kOutRow);
  _tile_stored(1, out1, kOutRow);
  _tile_stored(2, out2, kOutRow);
  _tile_stored(3, out3, kOutRow);
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

NEOX_AMX static inline void begin_products(bf16) {
  static constexpr TileConfig config{};
  _tile_loadconfig(&config);
}
NEOX_AMX static inline void end_products(bf16) { _tile_release(); }
#endif

static inline __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// 16 rows of 4-byte elements to columns: rows and lanes whose numbers differ in one bit change places, bit by bit.
template <int bit>
static inline void exchange(__m512i (&x)[16]) {
  const __m512i lane = lane_numbers(), flipped = _mm512_xor_si512(lane, _mm512_set1_epi32(bit));
  const __mmask16 set = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
  const __m512i second = _mm512_set1_epi32(16);  // from here on places in the second operand
  const __m512i low = _mm512_mask_or_epi32(lane, set, flipped, second);
  const __m512i high = _mm512_mask_or_epi32(flipped, set, lane, second);
  for (int i = 0; i < 16; ++i) {
    if (i & bit) continue;
    const __m512i a = x[i], b = x[i | bit];
    x[i] = _mm512_permutex2var_epi32(a, low, b);
    x[i | bit] = _mm512_permutex2var_epi32(a, high, b);
  }
}

static inline void transpose(__m512i (&x)[16]) {
  exchange<1>(x);
  exchange<2>(x);
  exchange<4>(x);
  exchange<8>(x);
}

static inline __m512i load_bits(const void* p, int64_t bytes) {
  return bytes <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(bytes < 64 ? ~0ull >> (64 - bytes) : ~0ull, p);
}

// A block of `rows` rows and `columns` columns, as a left operand: as it is.
template <class T>
static inline void pack_left(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < kBlock; ++r) {
    for (int64_t c = 0; c < kBlock; c += kLanes) {
      const int64_t lanes = r < rows ? columns - c : 0;
      store(to + r * kBlock + c, lanes >= kLanes ? load(from + r * stride + c)
                                 : lanes > 0     ? load(from + r * stride + c, lanes)
                                                 : broadcast(0.0f));
    }
  }
}

// Right operands: a block of values, and one of keys, which is transposed.
static inline void pack_values(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  pack_left(from, stride, rows, columns, to);
}

static inline void pack_values(const bf16* from, int64_t stride, int64_t rows, int64_t columns, bf16* to) {
  const __m512i lane = lane_numbers();
  // Of 32 elements each of two rows, i and 32 + i side by side.
  const __m512i left = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
  const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < kBlock; r += 2) {
    const __m512i a = load_bits(from + r * stride, r < rows ? 2 * columns : 0);
    const __m512i b = load_bits(from + (r + 1) * stride, r + 1 < rows ? 2 * columns : 0);
    _mm512_storeu_si512(to + r * kLanes, _mm512_permutex2var_epi16(a, left, b));
    _mm512_storeu_si512(to + kArea / 2 + r * kLanes, _mm512_permutex2var_epi16(a, right, b));
  }
}

template <class T>
static inline void pack_keys(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kColumns = 64 / sizeof(T);  // in one register
  for (int64_t c = 0; c < kBlock; c += kColumns) {
    for (int64_t first = 0; first < kBlock; first += 16) {
      __m512i x[16];
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t there = first + r < rows ? columns - c : 0;
        x[r] = load_bits(from + (first + r) * stride + c, there * static_cast<int64_t>(sizeof(T)));
      }
      transpose(x);
      for (int64_t r = 0; r < 16; ++r) {
        T* row = sizeof(T) == 4 ? to + (c + r) * kBlock + first : to + first * kBlock + r * kBlock;
        _mm512_storeu_si512(row, x[r]);
      }
    }
  }
}

}  // namespace neox::NEOX_CPU_ISA
#endif
