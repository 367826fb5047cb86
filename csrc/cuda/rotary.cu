// Rotary embedding on the GPU: q, k and v of one call in one launch, of one of two kernels. The work is memory traffic: every
// element is read once and written once, by the widest access that all addresses allow.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "cuda/rotary_columns.cuh"
#include "cuda/rotary_pairs.cuh"

// Weak, so that the library loads under a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace neox {
namespace {

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

// What the host found out about a call.
struct Call {
  const RotaryArgs& args;
  int64_t nheads;  // of the tensor with most
  int64_t vec;     // elements of one access
  int64_t unit;    // of them, neighbours whose partners are neighbours
  cudaStream_t stream;
};

// Threads of a head, of heads and of tokens; a thread takes up to `most` heads of q while enough threads remain for a large
// GPU: all that comes before the first head, its cos and sin among it, is then done for more of them.
void make_grid(const Call& call, int64_t pieces, int64_t most, dim3& grid, dim3& block) {
  const int64_t rows = rows_of(call.args), seqlen = call.args.seqlen;
  const int64_t x = std::clamp<int64_t>(pieces, 1, kThreads);
  const int64_t share = std::clamp<int64_t>(rows * seqlen * x * call.nheads / 65536, 1, most);
  const int64_t y = std::clamp<int64_t>((call.nheads + share - 1) / share, 1, kThreads / x);
  const int64_t z = std::min<int64_t>(std::clamp<int64_t>(seqlen, 1, kThreads / (x * y)), 64);
  block = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  const int64_t grid_y = std::min<int64_t>(rows, 65535);
  grid = dim3(static_cast<unsigned>((seqlen + z - 1) / z), static_cast<unsigned>(grid_y),
              static_cast<unsigned>((rows + grid_y - 1) / grid_y));
}

template <class T, int kVec, int kUnit, bool kInterleaved>
void launch_columns(const Call& call) {
  dim3 grid, block;
  // Up to four times what is under way at once, unless some of that were idle in the last of the threads.
  int64_t most = 4 * kHeadsAtOnce;
  while (most > kHeadsAtOnce && call.nheads % most != 0 && call.nheads % most <= most - kHeadsAtOnce) most /= 2;
  make_grid(call, call.args.head_dim / kVec, most, grid, block);
  rotary_columns_kernel<T, kVec, kUnit, kInterleaved><<<grid, block, 0, call.stream>>>(call.args);
}

template <class T, int kVec, bool kInterleaved>
void launch_pairs(const Call& call) {
  constexpr int64_t kPairs = kPairsOf<kVec, kInterleaved>;
  dim3 grid, block;
  make_grid(call, call.args.rotary_dim / 2 / kPairs, std::max<int64_t>(32 / kPairs, 1), grid, block);
  rotary_pairs_kernel<T, kVec, kInterleaved><<<grid, block, 0, call.stream>>>(call.args);
}

// An access of more than a unit, where there is an instance of it; else of a unit.
template <class T, bool kInterleaved>
void dispatch_columns(const Call& call) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  if (call.vec == kMost && call.unit == kMost) return launch_columns<T, kMost, kMost, kInterleaved>(call);
  if (call.vec == kMost && call.unit == 2) return launch_columns<T, kMost, 2, kInterleaved>(call);
  if constexpr (kMost == 8) {
    if (call.vec == kMost && call.unit == 4) return launch_columns<T, 8, 4, kInterleaved>(call);
    if (call.unit == 4) return launch_columns<T, 4, 4, kInterleaved>(call);
  }
  if (call.unit >= 2) return launch_columns<T, 2, 2, kInterleaved>(call);
  launch_columns<T, 1, 1, kInterleaved>(call);
}

template <class T, bool kInterleaved>
void dispatch_pairs(const Call& call) {
  if constexpr (sizeof(T) == 2) {
    if (call.unit == 8) return launch_pairs<T, 8, kInterleaved>(call);
  }
  switch (call.unit) {
    case 4: return launch_pairs<T, 4, kInterleaved>(call);
    case 2: return launch_pairs<T, 2, kInterleaved>(call);
    default: return launch_pairs<T, 1, kInterleaved>(call);
  }
}

template <class T, bool kInterleaved>
void dispatch_kernel(Call call) {
  constexpr int64_t kSize = sizeof(T);
  const RotaryArgs& args = call.args;
  Width data, unit, table;
  for (int32_t t = 0; t < args.ntensors; ++t) data.add(args.tensors[t], kSize);
  const bool in_place = args.tensors[0].in == args.tensors[0].out;
  unit = data;
  unit.add((kInterleaved ? args.rotary_dim : args.rotary_dim / 2) * kSize);
  data.add(args.head_dim * kSize);
  if (!in_place) unit.add(args.head_dim * kSize);
  table.add(args.cos);
  table.add(args.sin);
  const int64_t table_size = args.table_is_float32 ? 4 : kSize;
  for (const int64_t stride :
       {args.cos_stride_batch, args.cos_stride_position, args.sin_stride_batch, args.sin_stride_position}) {
    table.add(stride * table_size);
  }
  call.vec = data.bytes() / kSize;
  call.unit = unit.bytes() / kSize;
  // A unit's piece of a row of tables is read like its columns.
  const auto table_bytes = [&] { return (kInterleaved && call.unit > 1 ? call.unit / 2 : call.unit) * table_size; };
  while (call.unit > 1 && std::min<int64_t>(table_bytes(), 16) > table.bytes()) call.unit /= 2;
  if (in_place) {
    if (args.rotary_dim > 0) dispatch_pairs<T, kInterleaved>(call);
  } else {
    dispatch_columns<T, kInterleaved>(call);
  }
}

template <class T>
void dispatch_pairing(const Call& call) {
  if (call.args.interleaved) {
    dispatch_kernel<T, true>(call);
  } else {
    dispatch_kernel<T, false>(call);
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
  const Call call{args, nheads, 1, 1, static_cast<cudaStream_t>(stream)};
  switch (args.dtype) {
    case Dtype::kFloat32: dispatch_pairing<float>(call); break;
    case Dtype::kBFloat16: dispatch_pairing<__nv_bfloat16>(call); break;
    case Dtype::kFloat16: dispatch_pairing<__half>(call); break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("rotary: the launch failed: ") + cudaGetErrorString(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CUDA, m) { register_rotary<launch>(m); }

}  // namespace neox
