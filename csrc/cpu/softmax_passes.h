// What softmax and its gradient do to a row, pass by pass.
#pragma once
#include "cpu/vec_math.h"

namespace neox::NEOX_CPU_ISA {
namespace {

// How many numbers a lane adds up in float32 before a double takes their sum: each adds to the rounding error.
constexpr int64_t kChain = 128;

// The largest of x * scale.
template <class T>
float largest(const T* x, int64_t n, float scale) {
  const Vec s = broadcast(scale), lowest = broadcast(-kInfinity);
  Vec most[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * Vec::kSize <= n; i += 4 * Vec::kSize) {
    for (int64_t u = 0; u < 4; ++u) most[u] = max(most[u], mul(load(x + i + u * Vec::kSize), s));
  }
  for_vectors(n - i, [&](int64_t j, int64_t count) {
    most[0] = max(most[0], first_of(mul(load_some(x + i + j, count), s), count, lowest));
  });
  return max(max(max(most[0], most[1]), max(most[2], most[3])));
}

template <class T>
void store_shifted(const T* x, float* out, int64_t n, float scale, float most) {
  const Vec s = broadcast(scale), m = broadcast(most);
  for_vectors(n, [&](int64_t i, int64_t count) {
    store_some(out + i, sub(mul(load_some(x + i, count), s), m), count);
  });
}

// A fused operation rounds the maximum and its own element apart. That is a factor of the whole row, unless the maximum is so
// large (the lowest number of a mask, say) that the two differ by more than any exponential bears.
constexpr float kLargestFused = 65536.0f;

// exp(x * scale - most). As powers of 2, one fused operation gives the exponents; what rounding takes from the factor is
// added back.
struct Exponent {
  Vec factor, most, extra;
  Exponent(float scale, float largest) {
    const double exact = scale * kLog2E;
    const float rounded = static_cast<float>(exact);
    factor = broadcast(rounded);
    most = broadcast(static_cast<float>(largest * kLog2E));
    extra = broadcast(rounded != 0 ? static_cast<float>((exact - rounded) / rounded) : 0.0f);
  }
  Vec operator()(Vec x) const { return exp2(mul_sub(x, factor, most), extra); }
};

// e = exp(x * scale - most), and their sum: by vectors within a block, across blocks in double.
template <class T>
double powers_of_e(const T* x, float* e, int64_t n, float scale, float most) {
  constexpr int64_t kBlock = kChain * Vec::kSize;
  const Exponent exponent(scale, most);
  const Vec zero = broadcast(0.0f);
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    Vec part = zero;
    for_vectors(n - block < kBlock ? n - block : kBlock, [&](int64_t j, int64_t count) {
      const int64_t i = block + j;
      const Vec power = first_of(exponent(load_some(x + i, count)), count, zero);
      store_some(e + i, power, count);
      part = add(part, power);
    });
    total += sum(part);
  }
  return total;
}

struct Times {
  Vec factor;
  explicit Times(double exact) : factor(broadcast(static_cast<float>(exact))) {}
  Vec operator()(Vec x) const { return mul(x, factor); }
};

// What makes finite exponentials probabilities.
template <class Out>
struct Normalise : Times {
  using Times::Times;
};

// In float32 the product is that of the factor before it was rounded, so that the probability of a key that is alone is
// exactly 1. Narrower dtypes do not show it.
template <>
struct Normalise<float> {
  double exact;
  Vec factor, rest;
  explicit Normalise(double exact_factor) : exact(exact_factor) {
    const float rounded = static_cast<float>(exact), lost = static_cast<float>(exact - static_cast<double>(rounded));
    factor = broadcast(rounded);
    rest = broadcast(lost == lost ? lost : 0.0f);  // of infinity nothing is lost
  }
  Vec operator()(Vec x) const {
    if constexpr (kFused) return mul_add(x, factor, mul(x, rest));
    float lanes[Vec::kSize];
    store(lanes, x);
    for (float& lane : lanes) lane = static_cast<float>(lane * exact);
    return load(lanes);
  }
};

template <class T, class Out, class Function>
void store_each(const T* x, Out* out, int64_t n, const Function& function) {
  for_vectors(n, [&](int64_t i, int64_t count) { store_some(out + i, function(load_some(x + i, count)), count); });
}

template <class G, class P>
float dot_product(const G* g, const P* p, int64_t n) {
  constexpr int64_t kBlock = kChain * Vec::kSize;
  const Vec zero = broadcast(0.0f);
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t size = n - block < kBlock ? n - block : kBlock;
    Vec part[4] = {zero, zero, zero, zero};
    int64_t i = 0;
    for (; i + 4 * Vec::kSize <= size; i += 4 * Vec::kSize) {
      for (int64_t u = 0; u < 4; ++u) {
        const int64_t j = block + i + u * Vec::kSize;
        part[u] = mul_add(load(g + j), load(p + j), part[u]);
      }
    }
    // What lies past n is loaded as zero.
    for_vectors(size - i, [&](int64_t j, int64_t count) {
      part[0] = mul_add(load_some(g + block + i + j, count), load_some(p + block + i + j, count), part[0]);
    });
    total += sum(add(add(part[0], part[1]), add(part[2], part[3])));
  }
  return static_cast<float>(total);
}

template <class G, class P, class Out>
void store_gradient(const G* g, const P* p, Out* out, int64_t n, float dot, float factor) {
  const Vec d = broadcast(dot), f = broadcast(factor);
  for_vectors(n, [&](int64_t i, int64_t count) {
    store_some(out + i, mul(mul(load_some(p + i, count), f), sub(load_some(g + i, count), d)), count);
  });
}

template <class T>
double exponentials(const T* x, float* e, int64_t n, float scale, float most) {
  if (most < kLargestFused && most > -kLargestFused) return powers_of_e(x, e, n, scale, most);
  store_shifted(x, e, n, scale, most);
  return powers_of_e(e, e, n, 1.0f, 0.0f);
}

template <class T>
void fill_zero(T* out, int64_t n) {
  if (n > 0) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace
}  // namespace neox::NEOX_CPU_ISA
