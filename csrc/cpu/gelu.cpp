// GELU by its tanh formula (GPT-J's gelu_new) on the CPU: one pass, one exponential and one division for each element.
//
//   x (1 + tanh u) / 2  =  x e / (1 + e)  with  e = exp(2u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//
// which keeps the digits that 1 + tanh u loses where u is very negative.
#include "args.h"
#include "cpu/vec_math.h"

namespace neox {

struct GeluArgs {
  const void *in, *bias;  // bias of `width` elements, that of a row; nullptr: none
  void* out;              // may be `in`
  int64_t width;
  Dtype dtype;
};

NEOX_DECLARE_PER_ISA(void gelu_tanh(const GeluArgs& args, int64_t begin, int64_t end))

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
void gelu_part(const GeluArgs& args, int64_t begin, int64_t end) {
  const T *in = static_cast<const T*>(args.in), *bias = static_cast<const T*>(args.bias);
  T* out = static_cast<T*>(args.out);
  if (bias == nullptr) {
    in += begin, out += begin;
    for_vectors(end - begin, [&](int64_t i, int64_t lanes) { store_some(out + i, gelu(load_some(in + i, lanes)), lanes); });
    return;
  }
  for (int64_t i = begin; i < end;) {  // row by row, or what of it is ours
    const int64_t column = i % args.width, n = args.width - column < end - i ? args.width - column : end - i;
    for_vectors(n, [&](int64_t j, int64_t lanes) {
      const Vec x = add(load_some(in + i + j, lanes), load_some(bias + column + j, lanes));
      store_some(out + i + j, gelu(x), lanes);
    });
    i += n;
  }
}

}  // namespace

void gelu_tanh(const GeluArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::kFloat32: return gelu_part<float>(args, begin, end);
    case Dtype::kBFloat16: return gelu_part<bf16>(args, begin, end);
    case Dtype::kFloat16: return gelu_part<fp16>(args, begin, end);
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

void run(const GeluArgs& args, int64_t n) {
  const auto gelu_tanh = NEOX_SELECT_ISA(gelu_tanh);
  const auto work = [&](int64_t begin, int64_t end) { gelu_tanh(args, begin, end); };
  if (n <= kGrain) {
    work(0, n);
  } else {
    torch::stable::parallel_for(0, n, kGrain, work);
  }
}

Dtype dtype_of_x(const Tensor& x) { return dtype_of(x.scalar_type(), "gelu_tanh: x must be float32, bfloat16 or float16"); }

Tensor gelu_tanh_of(const Tensor& given) {
  const Dtype dtype = dtype_of_x(given);
  const Tensor x = torch::stable::contiguous(given);
  Tensor out = empty_contiguous_like(x);
  run({x.const_data_ptr(), nullptr, out.mutable_data_ptr(), 0, dtype}, x.numel());
  return out;
}

void gelu_tanh_inplace(const Tensor& x, const OptionalTensor& given_bias) {
  const Dtype dtype = dtype_of_x(x);
  require(x.is_contiguous(), "gelu_tanh: what is written must be contiguous");
  OptionalTensor bias = apart_from(given_bias, x);
  if (bias.has_value()) {
    require(bias->dim() == 1 && x.dim() > 0 && bias->size(0) == x.size(x.dim() - 1) &&
                bias->scalar_type() == x.scalar_type() && Place(*bias) == Place(x),
            "gelu_tanh: bias must be of the last dimension of x, and of its dtype and device");
    bias = torch::stable::contiguous(*bias);
  }
  void* data = x.mutable_data_ptr();
  const void* added = bias.has_value() ? bias->const_data_ptr() : nullptr;
  run({data, added, data, bias.has_value() ? bias->size(0) : 0, dtype}, x.numel());
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CPU, m) {
  m.impl("gelu_tanh", TORCH_BOX(&neox::gelu_tanh_of));
  m.impl("gelu_tanh.inference", TORCH_BOX(&neox::gelu_tanh_of));
  m.impl("gelu_tanh_", TORCH_BOX(&neox::gelu_tanh_inplace));
}
#endif
