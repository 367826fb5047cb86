// Rotary embedding on the GPU: q, k and v of one call in one launch.
//
// A block takes blockDim.z tokens. The threads of a token are blockDim.x pieces of the rotated features by blockDim.y heads:
// each reads its piece of cos and sin once, keeps it in registers, and walks over the heads of q and k. The work is memory
// traffic: every element is read once and written once, by the widest access that all addresses allow.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>

#include "cuda/pack.cuh"
#include "rotary_ops.h"

// Weak, so that the library loads under a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace neox {
namespace {

constexpr int kThreads = 128;  // of a block, at most

// Rows of a batch; variable-length input is one.
__host__ __device__ inline int64_t rows_of(const RotaryArgs& args) {
  return args.cu_seqlens.data != nullptr ? 1 : args.batch;
}

template <class Table, int kPairs>
__device__ void load_floats(const void* table, int64_t at, float (&out)[kPairs]) {
  const Pack<Table, kPairs> pack(static_cast<const Table*>(table) + at);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) out[i] = static_cast<float>(pack.at[i]);
}

// cos and sin of the pairs from `pair` on: NaN for a position outside the tables, which are not read there.
template <class T, int kPairs>
__device__ void load_cos_sin(const RotaryArgs& args, const RotaryToken& token, int pair, float (&c)[kPairs],
                             float (&s)[kPairs]) {
  if (token.position < 0 || token.position >= args.max_position) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) c[i] = s[i] = __int_as_float(0x7fc00000);
    return;
  }
  const int64_t cos_at = token.batch * args.cos_stride_batch + token.position * args.cos_stride_position + pair;
  const int64_t sin_at = token.batch * args.sin_stride_batch + token.position * args.sin_stride_position + pair;
  if (args.table_is_float32) {
    load_floats<float>(args.cos, cos_at, c);
    load_floats<float>(args.sin, sin_at, s);
  } else {
    load_floats<T>(args.cos, cos_at, c);
    load_floats<T>(args.sin, sin_at, s);
  }
  if (args.conjugate) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) s[i] = -s[i];
  }
}

// Pairs of features of one thread. Neighbours come in one access; halves in two, of the same number of elements.
template <int kVec, bool kInterleaved>
constexpr int kPairsOf = kInterleaved && kVec > 1 ? kVec / 2 : kVec;

template <class T, int kVec, bool kInterleaved>
__device__ void rotate_heads(const RotaryArgs& args, const RotaryTensor& tensor, const T* x, T* y, int pair,
                             const float (&c)[kPairsOf<kVec, kInterleaved>],
                             const float (&s)[kPairsOf<kVec, kInterleaved>]) {
  constexpr int kPairs = kPairsOf<kVec, kInterleaved>;
  constexpr int kLoads = 2 * kPairs / kVec;
  // A pair is a from the one access and b from the other, or two neighbours of the only one.
  constexpr bool kNeighbours = kLoads == 1;
  const int64_t second = kInterleaved ? 1 : args.rotary_dim / 2;
  const int64_t first = kInterleaved ? 2 * pair : pair;
  x += first + threadIdx.y * tensor.in_stride_head;
  y += first + threadIdx.y * tensor.out_stride_head;
  const int64_t in_step = blockDim.y * tensor.in_stride_head, out_step = blockDim.y * tensor.out_stride_head;
  const uint32_t nheads = static_cast<uint32_t>(tensor.nheads);
#pragma unroll 1
  for (uint32_t head = threadIdx.y; head < nheads; head += blockDim.y) {
    Pack<T, kVec> in[kLoads], out[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) in[i] = Pack<T, kVec>(x + i * second);
    float a[kPairs], b[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float u = static_cast<float>(kNeighbours ? in[0].at[2 * i] : in[0].at[i]);
      const float v = static_cast<float>(kNeighbours ? in[0].at[2 * i + 1] : in[kLoads - 1].at[i]);
      // Which product is fused is said here: left to the compiler, it differs between widths, and so would results.
      a[i] = __fmaf_rn(u, c[i], -__fmul_rn(v, s[i]));
      b[i] = __fmaf_rn(v, c[i], __fmul_rn(u, s[i]));
    }
    if constexpr (kNeighbours) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) round_pair(a[i], b[i], &out[0].at[2 * i]);
    } else if constexpr (kPairs > 1) {
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        round_pair(a[i], a[i + 1], &out[0].at[i]);
        round_pair(b[i], b[i + 1], &out[1].at[i]);
      }
    } else {
      out[0].at[0] = static_cast<T>(a[0]);
      out[1].at[0] = static_cast<T>(b[0]);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) out[i].store(y + i * second);
    x += in_step;
    y += out_step;
  }
}

// Copies `bytes` bytes of every head of the token.
template <class Access>
__device__ void copy_heads(const RotaryTensor& tensor, const char* x, char* y, int64_t element_size, int64_t bytes) {
  const uint32_t pieces = static_cast<uint32_t>(bytes / static_cast<int64_t>(sizeof(Access)));
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.y * blockDim.x;
  // All heads' pieces in one row; a thread finds its next piece by addition, for a division would cost more than the copy.
  uint32_t head = thread / pieces, piece = thread - head * pieces;
  const uint32_t head_step = threads / pieces, piece_step = threads - head_step * pieces;
  const int64_t in_stride = tensor.in_stride_head * element_size, out_stride = tensor.out_stride_head * element_size;
#pragma unroll 1
  while (head < tensor.nheads) {
    reinterpret_cast<Access*>(y + head * out_stride)[piece] = reinterpret_cast<const Access*>(x + head * in_stride)[piece];
    head += head_step;
    piece += piece_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++head;
    }
  }
}

template <class T>
__device__ void copy_columns(const RotaryTensor& tensor, const T* x, T* y, int64_t first, int64_t last, int width) {
  constexpr int64_t kSize = sizeof(T);
  if (first == last) return;
  const char* from = reinterpret_cast<const char*>(x + first);
  char* to = reinterpret_cast<char*>(y + first);
  switch (width) {
    case 16: return copy_heads<uint4>(tensor, from, to, kSize, (last - first) * kSize);
    case 8: return copy_heads<uint2>(tensor, from, to, kSize, (last - first) * kSize);
    case 4: return copy_heads<uint32_t>(tensor, from, to, kSize, (last - first) * kSize);
    default: return copy_heads<uint16_t>(tensor, from, to, kSize, (last - first) * kSize);
  }
}

// What the host found out about a call.
struct Plan {
  int pieces;      // of the rotated features of a head
  int copy_width;  // bytes of one access in copies; 0 where nothing is copied
};

// Seven blocks to a multiprocessor: without a number, ptxas spills a few bytes on sm_100 and sm_120 to fit in one more.
template <class T, int kVec, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 7) rotary_kernel(const __grid_constant__ RotaryArgs args, const Plan plan) {
  constexpr int kPairs = kPairsOf<kVec, kInterleaved>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  // The second and third dimensions of a grid end at 65535, so a larger batch takes both.
  const uint32_t batch = blockIdx.z * gridDim.y + blockIdx.y;
  if (row >= args.seqlen || batch >= rows_of(args)) return;
  const RotaryToken token = locate_token(args, batch, row);

  const int first_piece = static_cast<int>(threadIdx.x);
  int piece = first_piece;
  do {  // once, unless a head has more pieces than a block has threads
    const bool rotates = piece < plan.pieces && !token.padding;
    float c[kPairs], s[kPairs];
    if (rotates) load_cos_sin<T>(args, token, piece * kPairs, c, s);
#pragma unroll 1
    for (int t = 0; t < args.ntensors; ++t) {
      const RotaryTensor& tensor = args.tensors[t];
      int64_t out_row = row;
      if (tensor.append) {
        out_row += index_at(args.cache_seqlens, batch);
        if (out_row < 0 || out_row >= args.cache_length) continue;
      }
      const T* x = static_cast<const T*>(tensor.in) + batch * tensor.in_stride_batch + row * tensor.in_stride_seqlen;
      T* y = static_cast<T*>(tensor.out) + batch * tensor.out_stride_batch + out_row * tensor.out_stride_seqlen;
      if (rotates && tensor.rotate) rotate_heads<T, kVec, kInterleaved>(args, tensor, x, y, piece * kPairs, c, s);
      if (plan.copy_width != 0 && piece == first_piece && x != y) {
        const int64_t first = tensor.rotate && !token.padding ? args.rotary_dim : 0;
        copy_columns(tensor, x, y, first, args.head_dim, plan.copy_width);
      }
    }
    piece += static_cast<int>(blockDim.x);
  } while (piece < plan.pieces);
}

// The widest access, of 16 bytes at most, that all of these addresses and distances (in bytes) are multiples of.
class Width {
 public:
  void add(int64_t bytes) { bits_ |= static_cast<uint64_t>(bytes); }
  void add(const void* pointer) { bits_ |= reinterpret_cast<uint64_t>(pointer); }
  void add(const RotaryTensor& tensor, int64_t element_size) {
    add(tensor.in);
    add(tensor.out);
    for (const int64_t stride : {tensor.in_stride_batch, tensor.in_stride_seqlen, tensor.in_stride_head,
                                 tensor.out_stride_batch, tensor.out_stride_seqlen, tensor.out_stride_head}) {
      add(stride * element_size);
    }
  }
  int bytes() const { return static_cast<int>(bits_ & -bits_); }

 private:
  uint64_t bits_ = 16;
};

template <class T, int kVec, bool kInterleaved>
void launch_kernel(const RotaryArgs& args, int copy_width, int64_t nheads, cudaStream_t stream) {
  const int64_t pairs = kPairsOf<kVec, kInterleaved>;
  const Plan plan{static_cast<int>(args.rotary_dim / 2 / pairs), copy_width};
  const int64_t rows = rows_of(args);
  // A thread takes heads of q until it has 32 pairs, while enough threads remain for a large GPU: all that comes before the
  // first head, its cos and sin among it, is then done for more of them.
  const int64_t x = std::clamp<int64_t>(plan.pieces, 1, kThreads);
  const int64_t share = std::clamp<int64_t>(rows * args.seqlen * x * nheads / 65536, 1, 32 / pairs);
  const int64_t y = std::clamp<int64_t>((nheads + share - 1) / share, 1, kThreads / x);
  const int64_t z = std::clamp<int64_t>(args.seqlen, 1, kThreads / (x * y));
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(std::min<int64_t>(z, 64)));
  const int64_t grid_y = std::min<int64_t>(rows, 65535);
  const dim3 grid(static_cast<unsigned>((args.seqlen + block.z - 1) / block.z), static_cast<unsigned>(grid_y),
                  static_cast<unsigned>((rows + grid_y - 1) / grid_y));
  rotary_kernel<T, kVec, kInterleaved><<<grid, block, 0, stream>>>(args, plan);
}

template <class T, bool kInterleaved>
void launch_width(const RotaryArgs& args, int64_t nheads, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  Width rotate, copy;
  bool copies = args.cu_seqlens.data != nullptr || args.rotary_dim < args.head_dim;
  for (int32_t t = 0; t < args.ntensors; ++t) {
    copies = copies || !args.tensors[t].rotate;
    rotate.add(args.tensors[t], kSize);
    copy.add(args.tensors[t], kSize);
  }
  copy.add(args.rotary_dim * kSize);
  copy.add(args.head_dim * kSize);
  rotate.add((kInterleaved ? args.rotary_dim : args.rotary_dim / 2) * kSize);
  const int64_t table_size = args.table_is_float32 ? 4 : kSize;
  Width table;
  table.add(args.cos);
  table.add(args.sin);
  for (const int64_t stride :
       {args.cos_stride_batch, args.cos_stride_position, args.sin_stride_batch, args.sin_stride_position}) {
    table.add(stride * table_size);
  }
  int64_t vec = rotate.bytes() / kSize;
  // A thread's piece of a row of tables is read like its features.
  const auto table_bytes = [&] { return (kInterleaved && vec > 1 ? vec / 2 : vec) * table_size; };
  while (vec > 1 && std::min<int64_t>(table_bytes(), 16) > table.bytes()) vec /= 2;
  const int copy_width = copies ? copy.bytes() : 0;
  if constexpr (kSize == 2) {
    if (vec == 8) return launch_kernel<T, 8, kInterleaved>(args, copy_width, nheads, stream);
  }
  switch (vec) {
    case 4: return launch_kernel<T, 4, kInterleaved>(args, copy_width, nheads, stream);
    case 2: return launch_kernel<T, 2, kInterleaved>(args, copy_width, nheads, stream);
    default: return launch_kernel<T, 1, kInterleaved>(args, copy_width, nheads, stream);
  }
}

template <class T>
void launch_pairing(const RotaryArgs& args, int64_t nheads, cudaStream_t stream) {
  if (args.interleaved) {
    launch_width<T, true>(args, nheads, stream);
  } else {
    launch_width<T, false>(args, nheads, stream);
  }
}

void launch(const RotaryArgs& args, const Tensor& like) {
  int64_t nheads = 0;
  for (int32_t t = 0; t < args.ntensors; ++t) nheads = std::max(nheads, args.tensors[t].nheads);
  if (rows_of(args) == 0 || args.seqlen == 0 || nheads == 0 || args.head_dim == 0) return;
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  switch (args.dtype) {
    case Dtype::kFloat32: launch_pairing<float>(args, nheads, static_cast<cudaStream_t>(stream)); break;
    case Dtype::kBFloat16: launch_pairing<__nv_bfloat16>(args, nheads, static_cast<cudaStream_t>(stream)); break;
    case Dtype::kFloat16: launch_pairing<__half>(args, nheads, static_cast<cudaStream_t>(stream)); break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("rotary: the launch failed: ") + cudaGetErrorString(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CUDA, m) { register_rotary<launch>(m); }

}  // namespace neox
