// Unpad and pad on the GPU: a gather of the rows of several tensors in one launch, and the metadata in two.
//
// The gather: the grid's second dimension counts the tensors; a block takes several lines (a block of memory of one row of the
// result), and the threads of a line copy or zero it by the widest access that its tensor's addresses allow.
//
// The metadata: one block per sequence counts its tokens, then one block per sequence places them. How many stand before
// its own, each block adds up itself from all counts: cheaper than a third launch for a scan until there are many thousand
// sequences.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "varlen_ops.h"

// Weak, so that the library loads under a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace neox {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// What the host found out about each tensor.
struct Plan {
  uint8_t width[kMaxTensors];        // bytes of one access
  uint8_t log_threads[kMaxTensors];  // of the threads that share a line
};

template <class Access>
__device__ void gather_line(const GatherArgs& args, const RowTensor& tensor, int log_threads) {
  const uint32_t thread = threadIdx.x & ((1u << log_threads) - 1);
  const int64_t line = static_cast<int64_t>(blockIdx.x) * (kThreads >> log_threads) + (threadIdx.x >> log_threads);
  if (line >= args.rows_out * tensor.blocks) return;
  const int64_t row = tensor.blocks == 1 ? line : line / tensor.blocks;
  const int64_t index = index_at(args.indices, row);
  const uint32_t pieces = static_cast<uint32_t>(tensor.block_bytes / static_cast<int64_t>(sizeof(Access)));
  Access* out = reinterpret_cast<Access*>(tensor.out + line * tensor.block_bytes);
  // Nothing is read for an index that is no row: it gives zeros.
  if (index < 0 || index >= args.rows_in) {
    for (uint32_t i = thread; i < pieces; i += 1u << log_threads) out[i] = Access{};
    return;
  }
  int64_t at = (line - row * tensor.blocks) * tensor.stride_block;
  if (tensor.seqlen == args.rows_in) {
    at += index * tensor.stride_seqlen;
  } else {
    const int64_t batch = index / tensor.seqlen;
    at += batch * tensor.stride_batch + (index - batch * tensor.seqlen) * tensor.stride_seqlen;
  }
  const Access* in = reinterpret_cast<const Access*>(tensor.in + at);
#pragma unroll 4
  for (uint32_t i = thread; i < pieces; i += 1u << log_threads) out[i] = in[i];
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArgs args,
                                                         const __grid_constant__ Plan plan) {
  const RowTensor& tensor = args.tensors[blockIdx.y];
  const int log_threads = plan.log_threads[blockIdx.y];
  switch (plan.width[blockIdx.y]) {
    case 16: return gather_line<uint4>(args, tensor, log_threads);
    case 8: return gather_line<uint2>(args, tensor, log_threads);
    case 4: return gather_line<uint32_t>(args, tensor, log_threads);
    case 2: return gather_line<uint16_t>(args, tensor, log_threads);
    default: return gather_line<uint8_t>(args, tensor, log_threads);
  }
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("varlen: the launch failed: ") + cudaGetErrorString(error));
}

// The widest access, of 16 bytes at most, that every address and distance of the tensor is a multiple of.
int width_of(const RowTensor& tensor) {
  uint64_t bits = 16 | reinterpret_cast<uint64_t>(tensor.in) | reinterpret_cast<uint64_t>(tensor.out);
  for (const int64_t bytes : {tensor.stride_batch, tensor.stride_seqlen, tensor.stride_block, tensor.block_bytes}) {
    bits |= static_cast<uint64_t>(bytes);
  }
  return static_cast<int>(bits & -bits);
}

void launch_gather(const GatherArgs& args, bool /*strict: looking would cost a sync*/, const Tensor& like) {
  if (args.rows_out == 0 || args.ntensors == 0) return;
  Plan plan{};
  int64_t blocks = 0;
  for (int32_t t = 0; t < args.ntensors; ++t) {
    const RowTensor& tensor = args.tensors[t];
    const int width = width_of(tensor);
    require(tensor.block_bytes / width < int64_t{1} << 32, "varlen: a row must have fewer than 2**32 elements");
    // One access a thread, so that neighbours write neighbouring sectors; where that takes more than a warp, up to four, so
    // that finding its index pays.
    int log_threads = 0;
    while (log_threads < 5 && (int64_t{width} << log_threads) < tensor.block_bytes) ++log_threads;
    while ((kThreads >> log_threads) > 1 && (int64_t{width} << (log_threads + 2)) < tensor.block_bytes) ++log_threads;
    plan.width[t] = static_cast<uint8_t>(width);
    plan.log_threads[t] = static_cast<uint8_t>(log_threads);
    const int64_t lines = kThreads >> log_threads;
    blocks = std::max(blocks, (args.rows_out * tensor.blocks + lines - 1) / lines);
  }
  require(blocks < int64_t{1} << 31, "varlen: more rows than a grid has blocks");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.ntensors));
  gather_kernel<<<grid, kThreads, 0, current_stream(device)>>>(args, plan);
  check_launch();
}

// The sum over the block, in every thread.
__device__ int block_sum(int value, int* shared) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();  // shared may still be read from the last time
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

// Tokens of sequence b to counts[b], invalid values to counts[batch + b].
template <class Bits>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ MaskArgs args, int* counts) {
  __shared__ int shared[kWarps];
  const int64_t b = blockIdx.x;
  int tokens = 0, invalid = 0;
  for (int64_t s = threadIdx.x; s < args.seqlen; s += kThreads) {
    const MaskValue value = mask_value<Bits>(args, b, s);
    tokens += value.token;
    invalid += value.invalid;
  }
  tokens = block_sum(tokens, shared);
  invalid = block_sum(invalid, shared);
  if (threadIdx.x == 0) {
    counts[b] = tokens;
    counts[args.batch + b] = invalid;
  }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ MaskArgs args, const int* counts) {
  __shared__ int shared[kWarps];
  __shared__ int warp_tokens[kWarps];
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int before = 0, total = 0, invalid = 0, longest = 0;
  for (int64_t other = thread; other < args.batch; other += kThreads) {
    const int count = counts[other];
    before += other < b ? count : 0;
    total += count;
    invalid += counts[args.batch + other];
    longest = max(longest, count);
  }
  before = block_sum(before, shared);
  total = block_sum(total, shared);
  if (b == 0) {
    invalid = block_sum(invalid, shared);
    for (int step = 16; step > 0; step /= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, step));
    if (lane == 0) warp_tokens[warp] = longest;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kWarps; ++w) longest = max(longest, warp_tokens[w]);
      args.cu_seqlens[0] = 0;
      args.facts[0] = total;
      args.facts[1] = longest;
      args.facts[2] = invalid;
    }
  }
  if (b < args.batch) {
    int n = before;  // tokens ahead of this round's
    for (int64_t first = 0; first < args.seqlen; first += kThreads) {
      const int64_t s = first + thread;
      const bool token = s < args.seqlen && mask_value<Bits>(args, b, s).token;
      const unsigned ballot = __ballot_sync(~0u, token);
      __syncthreads();
      if (lane == 0) warp_tokens[warp] = __popc(ballot);
      __syncthreads();
      int order = n + __popc(ballot & ((1u << lane) - 1));
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        order += w < warp ? warp_tokens[w] : 0;
        n += warp_tokens[w];
      }
      const bool placed = token && order < args.capacity;
      if (s < args.seqlen) args.inverse[b * args.seqlen + s] = placed ? order : -1;
      if (placed) args.indices[order] = b * args.seqlen + s;
    }
    if (thread == 0) args.cu_seqlens[b + 1] = static_cast<int32_t>(n < args.capacity ? n : args.capacity);
  }
  // The blocks share the room behind the last token.
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = total + b * kThreads + thread; i < args.capacity; i += step) args.indices[i] = -1;
}

template <class Bits>
void launch_kernels(const MaskArgs& args, int* counts, cudaStream_t stream) {
  const unsigned batch = static_cast<unsigned>(args.batch);
  if (batch > 0) count_kernel<Bits><<<batch, kThreads, 0, stream>>>(args, counts);
  place_kernel<Bits><<<batch > 0 ? batch : 1, kThreads, 0, stream>>>(args, counts);
}

void launch_metadata(const MaskArgs& args, const Tensor& mask) {
  require(args.batch < int64_t{1} << 31, "varlen: more sequences than a grid has blocks");
  const int32_t device = mask.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t room[] = {2 * args.batch};
  const Tensor scratch = empty_contiguous(room, 1, ScalarType::Int, Place(mask));
  int* counts = static_cast<int*>(scratch.mutable_data_ptr());
  const cudaStream_t stream = current_stream(device);
  switch (args.element_size) {
    case 1: launch_kernels<uint8_t>(args, counts, stream); break;
    case 2: launch_kernels<uint16_t>(args, counts, stream); break;
    case 4: launch_kernels<uint32_t>(args, counts, stream); break;
    default: launch_kernels<uint64_t>(args, counts, stream); break;
  }
  check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CUDA, m) { register_varlen<launch_gather, launch_metadata>(m); }

}  // namespace neox
