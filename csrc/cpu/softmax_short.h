// Softmax and gradient of a row whose few vectors fit into registers, where no mask has to be applied. Each number of vectors
// has code of its own without a loop, so that the processor begins the next row while this one waits for its sums.
#pragma once
#include "cpu/softmax_passes.h"

namespace neox::NEOX_CPU_ISA {
namespace {

// Folds the vectors by two and two into the first one.
template <int kVectors, class Fold>
inline Vec fold(Vec (&v)[kVectors], const Fold& pair) {
  for (int n = kVectors; n > 1; n = (n + 1) / 2) {
    for (int i = 0; i < n / 2; ++i) v[i] = pair(v[i], v[(n + 1) / 2 + i]);
  }
  return v[0];
}

// The softmax of the n scores at x, times head_factor, to out. False, and nothing is written, where the row must go the long
// way: its largest score is infinite, huge or NaN.
template <int kVectors, class T, class Out>
inline bool softmax_vectors(const T* x, Out* out, int64_t n, float scale, float head_factor) {
  constexpr int kLast = kVectors - 1;
  const int64_t rest = n - kLast * Vec::kSize;
  const Vec s = broadcast(scale);
  Vec v[kVectors], folded[kVectors];
  for (int i = 0; i < kLast; ++i) v[i] = load(x + i * Vec::kSize);
  v[kLast] = load(x + kLast * Vec::kSize, rest);
  for (int i = 0; i < kVectors; ++i) folded[i] = mul(v[i], s);
  folded[kLast] = first_of(folded[kLast], rest, broadcast(-kInfinity));
  const float most = max(fold(folded, [](Vec a, Vec b) { return max(a, b); }));
  if (!(most < kLargestFused && most > -kLargestFused)) return false;
  const Exponent exponent(scale, most);
  for (int i = 0; i < kVectors; ++i) v[i] = exponent(v[i]);
  v[kLast] = first_of(v[kLast], rest, broadcast(0.0f));
  for (int i = 0; i < kVectors; ++i) folded[i] = v[i];
  const float total = sum(fold(folded, [](Vec a, Vec b) { return add(a, b); }));
  if (total != total) return false;
  const Normalise<Out> normalise(1.0 / total * head_factor);
  for (int i = 0; i < kLast; ++i) store(out + i * Vec::kSize, normalise(v[i]));
  store(out + kLast * Vec::kSize, normalise(v[kLast]), rest);
  return true;
}

// The gradient p * (g - sum(g p)) * factor of n scores to out; the sum is returned.
template <int kVectors, class P, class Out>
inline float gradient_vectors(const P* g, const P* p, Out* out, int64_t n, float factor) {
  constexpr int kLast = kVectors - 1;
  const int64_t rest = n - kLast * Vec::kSize;
  Vec grad[kVectors], probs[kVectors], folded[kVectors];
  for (int i = 0; i < kLast; ++i) {
    grad[i] = load(g + i * Vec::kSize);
    probs[i] = load(p + i * Vec::kSize);
  }
  grad[kLast] = load(g + kLast * Vec::kSize, rest);
  probs[kLast] = load(p + kLast * Vec::kSize, rest);
  for (int i = 0; i < kVectors; ++i) folded[i] = mul(grad[i], probs[i]);
  const float dot = sum(fold(folded, [](Vec a, Vec b) { return add(a, b); }));
  const Vec d = broadcast(dot), f = broadcast(factor);
  for (int i = 0; i < kLast; ++i) store(out + i * Vec::kSize, mul(mul(probs[i], f), sub(grad[i], d)));
  store(out + kLast * Vec::kSize, mul(mul(probs[kLast], f), sub(grad[kLast], d)), rest);
  return dot;
}

template <int kVectors>
struct Vectors {
  static constexpr int kCount = kVectors;
};

// What function(Vectors) says for the number of vectors that n elements fill; false if they are none or too many.
template <class Function>
inline bool by_vectors(int64_t n, const Function& function) {
  switch ((n + Vec::kSize - 1) / Vec::kSize) {
    case 1: return function(Vectors<1>{});
    case 2: return function(Vectors<2>{});
    case 3: return function(Vectors<3>{});
    case 4: return function(Vectors<4>{});
    case 5: return function(Vectors<5>{});
    case 6: return function(Vectors<6>{});
    case 7: return function(Vectors<7>{});
    case 8: return function(Vectors<8>{});
    default: return false;
  }
}

}  // namespace
}  // namespace neox::NEOX_CPU_ISA
