// What the ops of every family do with torch tensors, on PyTorch's stable ABI.
#pragma once
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "args.h"

namespace neox {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Place {
  int32_t type, index;
  explicit Place(const Tensor& x) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

// Memory that malloc has not at hand (always above 32 MB, its largest threshold) costs more than the arithmetic, fault by
// fault: 67 MB took 51 ms to write first in pages of 4 KB, and 18 ms in pages of 2 MB.
inline void advise_huge_pages(const Tensor& x, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < int64_t{8} << 20) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (data + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (data + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)x, (void)bytes;
#endif
}

constexpr int64_t kMaxDims = 64;

// Fresh memory by the C function behind torch::stable::empty: a second trip through the dispatcher would cost 1 us.
inline Tensor empty_contiguous(const int64_t* sizes, int64_t dims, ScalarType type, const Place& place) {
  require(dims <= kMaxDims, "a tensor must have at most 64 dimensions");
  int64_t strides[kMaxDims], numel = 1;
  bool empty = false;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = numel;
    numel *= sizes[d] > 0 ? sizes[d] : 1;
    empty = empty || sizes[d] == 0;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type), place.type, place.index, &handle));
  Tensor made(handle);
  if (!empty && place.type == aoti_torch_device_type_cpu()) {
    advise_huge_pages(made, numel * static_cast<int64_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(type))));
  }
  return made;
}

inline Tensor empty_contiguous_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty_contiguous(sizes.data(), static_cast<int64_t>(sizes.size()), x.scalar_type(), Place(x));
}

inline bool last_dim_is_contiguous(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.size(last) <= 1 || x.stride(last) == 1;
}

inline Tensor with_contiguous_last_dim(const Tensor& x) {
  return last_dim_is_contiguous(x) ? x : torch::stable::contiguous(x);
}

inline void require_writable(const Tensor& x) {
  require(last_dim_is_contiguous(x), "what is written must have a contiguous last dimension");
  for (int64_t d = 0; d < x.dim(); ++d) {
    require(x.stride(d) != 0 || x.size(d) <= 1, "what is written must not be an expanded tensor");
  }
}

// Where the memory of a tensor that is not empty begins and ends.
inline std::pair<uintptr_t, uintptr_t> memory_of(const Tensor& x) {
  int64_t elements = 1;
  for (int64_t d = 0; d < x.dim(); ++d) elements += (x.size(d) - 1) * x.stride(d);
  const auto first = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return {first, first + static_cast<uintptr_t>(elements) * x.element_size()};
}

// x, or a copy where it may lie within what is written while it is read.
inline OptionalTensor apart_from(const OptionalTensor& x, const Tensor& written) {
  if (!x.has_value() || x->numel() == 0 || written.numel() == 0) return x;
  const auto [first, last] = memory_of(*x);
  const auto [first_written, last_written] = memory_of(written);
  if (last <= first_written || last_written <= first) return x;
  return torch::stable::clone(*x);
}

inline Dtype dtype_of(ScalarType type, const char* message) {
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, message);
  return type == ScalarType::Float      ? Dtype::kFloat32
         : type == ScalarType::BFloat16 ? Dtype::kBFloat16
                                        : Dtype::kFloat16;
}

inline Indices indices_of(const Tensor& x, const Place& place, const char* message) {
  const ScalarType type = x.scalar_type();
  require((type == ScalarType::Long || type == ScalarType::Int) && Place(x) == place, message);
  return {x.const_data_ptr(), type == ScalarType::Long};
}

}  // namespace neox
