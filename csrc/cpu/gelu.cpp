// GELU by its tanh formula (GPT-J's gelu_new) on the CPU: one pass, one exponential and one division for each element.
//
//   x (1 + tanh u) / 2  =  x e / (1 + e)  with  e = exp(2u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//
// which keeps the digits that 1 + tanh u loses where u is very negative.
#include "args.h"
#include "cpu/vec_math.h"

namespace neox {

NEOX_DECLARE_PER_ISA(void gelu_tanh(const void* in, void* out, Dtype dtype, int64_t begin, int64_t end))

namespace NEOX_CPU_ISA {
namespace {

constexpr float kCubic = 0.044715f;
constexpr float kToExponent = 2.302208198f;  // 2 sqrt(2 / pi) log2(e)
constexpr float kLargestExponent = 60.0f;    // from here on e / (1 + e) is 1

inline Vec gelu(Vec x) {
  const Vec inner = mul(x, mul_add(mul(x, x), broadcast(kCubic), broadcast(1.0f)));
  const Vec exponent = min(broadcast(kLargestExponent), mul(inner, broadcast(kToExponent)));
  const Vec e = exp2(exponent, broadcast(0.0f));
  return mul(x, div(e, add(e, broadcast(1.0f))));
}

template <class T>
void gelu_of(const T* in, T* out, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t lanes) { store_some(out + i, gelu(load_some(in + i, lanes)), lanes); });
}

template <class T>
void gelu_part(const void* in, void* out, int64_t begin, int64_t end) {
  gelu_of(static_cast<const T*>(in) + begin, static_cast<T*>(out) + begin, end - begin);
}

}  // namespace

void gelu_tanh(const void* in, void* out, Dtype dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::kFloat32: return gelu_part<float>(in, out, begin, end);
    case Dtype::kBFloat16: return gelu_part<bf16>(in, out, begin, end);
    case Dtype::kFloat16: return gelu_part<fp16>(in, out, begin, end);
  }
}

}  // namespace NEOX_CPU_ISA
}  // namespace neox

#if defined(NEOX_CPU_DEFAULT)
#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth waking a thread for: some 10 us of work

Tensor gelu_tanh_of(const Tensor& given) {
  const Dtype dtype = dtype_of(given.scalar_type(), "gelu_tanh: x must be float32, bfloat16 or float16");
  const Tensor x = torch::stable::contiguous(given);
  Tensor out = empty_contiguous_like(x);
  const int64_t n = x.numel();
  const void* in = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const auto gelu_tanh = NEOX_SELECT_ISA(gelu_tanh);
  const auto work = [&](int64_t begin, int64_t end) { gelu_tanh(in, to, dtype, begin, end); };
  if (n <= kGrain) {
    work(0, n);
  } else {
    torch::stable::parallel_for(0, n, kGrain, work);
  }
  return out;
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CPU, m) {
  m.impl("gelu_tanh", TORCH_BOX(&neox::gelu_tanh_of));
  m.impl("gelu_tanh.inference", TORCH_BOX(&neox::gelu_tanh_of));
}
#endif
