// What the kernels' arguments are made of, in plain C++: the CPU kernels, built once per instruction set without any torch
// header, and the CUDA kernels both take them.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define NEOX_HOST_DEVICE __host__ __device__
#else
#define NEOX_HOST_DEVICE
#endif

namespace neox {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

// A tensor of int32 or int64, or none.
struct Indices {
  const void* data;
  bool is_int64;
};

// Functions of these headers are static: each instruction set keeps its own copy, so that the linker cannot serve an
// old processor the copy that was compiled for a new one.

[[maybe_unused]] static inline NEOX_HOST_DEVICE int64_t index_at(const Indices& indices, int64_t i) {
  return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i]
                          : static_cast<int64_t>(static_cast<const int32_t*>(indices.data)[i]);
}

}  // namespace neox
