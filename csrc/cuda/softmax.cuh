// What the softmax kernels on the GPU share: who takes which row, its elements in registers, sums over it, the launch.
//
// A row is read and written by 16 bytes: by one warp, by the warps of a block where it is long, and by more of them
// where rows are few, as in decoding.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <initializer_list>

#include "cuda/pack.cuh"
#include "softmax_ops.h"

// Weak, so that the library loads under a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace neox {
namespace {

constexpr int kMaxThreads = 512;  // of a row
constexpr int kRowsPerBlock = 4;  // of one warp each

// Elements of one access.
template <class T>
constexpr int kVecOf = 16 / static_cast<int>(sizeof(T));

// Accesses that a thread keeps in registers. Masks and dropout, once for each of 4 of them, would not fit into 64 registers,
// and their code would be most of the library; a row of 4096 keys is kept by 512 threads then.
__host__ __device__ constexpr int slots_of(int vec, bool general) { return !general ? 4 : vec == 8 ? 1 : 2; }

// What the host found out about a call.
struct Plan {
  bool aligned;       // rows can be read and written by 16 bytes
  bool mask_aligned;  // and those of attn_mask by as many elements
  bool padding_aligned;
};

struct Add {
  static constexpr float kIdentity = 0.0f;
  __device__ static float of(float a, float b) { return a + b; }
};
struct Max {
  static constexpr float kIdentity = -INFINITY;
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
__device__ float reduce_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// Over the threads of a row: a warp, or the whole block. `partial` must not be that of the reduction just before, which
// others may still be reading.
template <class Op>
__device__ float reduce_row(float x, float* partial) {
  x = reduce_warp<Op>(x);
  if (blockDim.x == 32) return x;
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  return reduce_warp<Op>(lane < blockDim.x / 32 ? partial[lane] : Op::kIdentity);
}

// A row of this thread.
struct Row {
  int64_t b, h, q, index;
  int visible;
};

// Batch, head and query; false where there are none.
__device__ bool find_row(const SoftmaxArgs& args, Row& row) {
  // The second and third dimensions of a grid end at 65535, so many heads take both.
  const uint32_t head = blockIdx.z * gridDim.y + blockIdx.y, nheads = static_cast<uint32_t>(args.nheads);
  row.b = head / nheads;
  row.h = head % nheads;
  row.q = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  row.index = static_cast<int64_t>(head) * args.q_len + row.q;
  row.visible = static_cast<int>(visible_keys(args, row.q));
  return row.b < args.batch && row.q < args.q_len;
}

template <class T>
__device__ T* row_of(const Scores& x, const Row& row) {
  return static_cast<T*>(x.data) + row.b * x.stride_batch + row.h * x.stride_head + row.q * x.stride_q;
}

__device__ float float_at(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    case Dtype::kFloat16: return __half2float(static_cast<const __half*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

__device__ float head_factor(const SoftmaxArgs& args, const Row& row) {
  if (args.head_mask == nullptr) return 1.0f;
  return float_at(args.head_mask, args.head_mask_dtype,
                  row.b * args.head_mask_stride_batch + row.h * args.head_mask_stride_head);
}

// kVec neighbours from column k on; without kWhole, those that lie behind `end` are not touched, and read as zero.
template <class T, int kVec>
__device__ void load_vector(const T* x, int k, int end, bool whole, Pack<T, kVec>& pack) {
  if (whole) {
    pack = Pack<T, kVec>(x + k);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) pack.at[j] = k + j < end ? x[k + j] : T(0.0f);
}

template <class T, int kVec>
__device__ void store_vector(T* x, int k, int end, bool whole, const float (&values)[kVec]) {
  Pack<T, kVec> pack;
#pragma unroll
  for (int j = 0; j < kVec; j += 2) round_pair(values[j], values[j + 1], &pack.at[j]);
  if (whole) {
    pack.store(x + k);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    if (k + j < end) x[k + j] = pack.at[j];
  }
}

// Which of kVec elements from column k on dropout drops, as bits.
template <int kVec>
__device__ uint32_t dropped(const SoftmaxArgs& args, const Row& row, int k) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kVec; j += 4) {
    const Words words = philox(static_cast<uint64_t>(args.rng[0]), static_cast<uint32_t>((k + j) / 4),
                               static_cast<uint32_t>(row.index), static_cast<uint32_t>(row.index >> 32),
                               static_cast<uint32_t>(args.rng[1]));
#pragma unroll
    for (int word = 0; word < 4; ++word) bits |= (words.at[word] < args.dropout_threshold ? 1u : 0u) << (j + word);
  }
  return bits;
}

template <class Out, int kVec>
__device__ void store_zeros(Out* out, int k, int k_len, bool whole) {
  const float zeros[kVec] = {};
  store_vector(out, k, k_len, whole, zeros);
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

bool aligned(const void* data, int64_t bytes, int64_t size, std::initializer_list<int64_t> strides) {
  bool is = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
  for (const int64_t stride : strides) is = is && stride * size % bytes == 0;
  return is;
}

// Whether rows can be moved by `vec` elements: 16 bytes of x, or what goes with them elsewhere.
bool aligned(const Scores& x, int64_t vec, int64_t k_len) {
  const int64_t size = size_of(x.dtype), bytes = std::min<int64_t>(vec * size, 16);
  return x.data == nullptr ||
         (k_len % vec == 0 && aligned(x.data, bytes, size, {x.stride_batch, x.stride_head, x.stride_q}));
}

// A warp takes a row that fits into its registers, and shares a block with others; a longer row takes a block.
void make_grid(const SoftmaxArgs& args, int64_t vec, bool general, dim3& grid, dim3& block) {
  const int64_t heads = args.batch * args.nheads;
  // Rows that would leave most of a large GPU idle get a thread for each access, and take less time.
  const int64_t slots = heads * args.q_len < 1024 ? 1 : slots_of(static_cast<int>(vec), general);
  const int64_t threads = std::min<int64_t>((args.k_len + 32 * vec * slots - 1) / (32 * vec * slots) * 32, kMaxThreads);
  const int64_t rows = threads > 32 ? 1 : std::min<int64_t>(args.q_len, kRowsPerBlock);
  block = dim3(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
  const int64_t y = std::min<int64_t>(heads, 65535);
  grid = dim3(static_cast<unsigned>((args.q_len + block.y - 1) / block.y), static_cast<unsigned>(y),
              static_cast<unsigned>((heads + y - 1) / y));
}

bool is_empty(const SoftmaxArgs& args) {
  constexpr int64_t kMost = int64_t{1} << 30;
  require(args.q_len <= kMost && args.k_len <= kMost && args.batch * args.nheads <= kMost,
          "causal_softmax: on a GPU queries, keys and heads of all sequences end at 2^30 each");
  return args.batch == 0 || args.nheads == 0 || args.q_len == 0 || args.k_len == 0;
}

// Calls function with a value of the type.
template <class Function>
void dispatch(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat32: return function(float{});
    case Dtype::kBFloat16: return function(__nv_bfloat16{});
    case Dtype::kFloat16: return function(__half{});
  }
}

// launch(stream) on the device of `like`.
template <class Launch>
void on_device(const Tensor& like, const Launch& launch) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("causal_softmax: the launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace
}  // namespace neox
