// Unpad and pad on the CPU: a gather of rows, by runs. Padding leaves the tokens of a sequence next to each other, so most of
// the work is a few large copies; what is not copied is zeroed, and nothing is written twice.
#include "cpu/vec.h"
#include "varlen_args.h"

namespace neox {

// Gathers the result rows begin <= row < end of every tensor.
NEOX_DECLARE_PER_ISA(void gather(const GatherArgs& args, int64_t begin, int64_t end))

namespace NEOX_CPU_ISA {
namespace {

// The C library knows when a large copy should go past the cache; a short one is done before it has found out.
inline void copy_piece(char* to, const char* from, int64_t bytes) {
  if (bytes < 512) {
    copy_bytes(to, from, bytes);
  } else {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

// `n` neighbouring rows from `first` on.
void copy_rows(const RowTensor& tensor, int64_t first, int64_t n, char* out) {
  const int64_t row_bytes = tensor.blocks * tensor.block_bytes;
  while (n > 0) {
    const int64_t batch = first / tensor.seqlen, row = first % tensor.seqlen;
    const int64_t rows = n < tensor.seqlen - row ? n : tensor.seqlen - row;
    const char* in = tensor.in + batch * tensor.stride_batch + row * tensor.stride_seqlen;
    if (tensor.blocks == 1 && tensor.stride_seqlen == row_bytes) {
      copy_piece(out, in, rows * row_bytes);
    } else {
      char* to = out;
      for (int64_t r = 0; r < rows; ++r, in += tensor.stride_seqlen) {
        for (int64_t block = 0; block < tensor.blocks; ++block, to += tensor.block_bytes) {
          copy_piece(to, in + block * tensor.stride_block, tensor.block_bytes);
        }
      }
    }
    out += rows * row_bytes;
    first += rows;
    n -= rows;
  }
}

template <class Index>
void gather_by(const GatherArgs& args, const Index* indices, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t first = indices[begin];
    int64_t n = 1;
    if (first < 0) {
      while (begin + n < end && indices[begin + n] < 0) ++n;
    } else {
      while (begin + n < end && indices[begin + n] == first + n) ++n;
    }
    for (int32_t t = 0; t < args.ntensors; ++t) {
      const RowTensor& tensor = args.tensors[t];
      const int64_t row_bytes = tensor.blocks * tensor.block_bytes;
      char* out = tensor.out + begin * row_bytes;
      if (first < 0) {
        std::memset(out, 0, static_cast<size_t>(n * row_bytes));
      } else {
        copy_rows(tensor, first, n, out);
      }
    }
    begin += n;
  }
}

}  // namespace

void gather(const GatherArgs& args, int64_t begin, int64_t end) {
  if (args.indices.is_int64) {
    gather_by(args, static_cast<const int64_t*>(args.indices.data), begin, end);
  } else {
    gather_by(args, static_cast<const int32_t*>(args.indices.data), begin, end);
  }
}

}  // namespace NEOX_CPU_ISA
}  // namespace neox

#if defined(NEOX_CPU_DEFAULT)
#include "varlen_ops.h"

namespace neox {
namespace {

// Every index, before anything is written.
void check_indices(const GatherArgs& args, bool strict) {
  const int64_t lowest = strict ? 0 : -1;
  for (int64_t i = 0; i < args.rows_out; ++i) {
    const int64_t index = index_at(args.indices, i);
    if (index < lowest || index >= args.rows_in) {
      throw std::out_of_range("index " + std::to_string(index) + " at " + std::to_string(i) + " is outside the " +
                              std::to_string(args.rows_in) + " rows");
    }
  }
}

void launch_gather(const GatherArgs& args, bool strict, const Tensor&) {
  check_indices(args, strict);
  if (args.rows_out == 0 || args.ntensors == 0) return;
  int64_t row_bytes = 0;
  for (int32_t t = 0; t < args.ntensors; ++t) row_bytes += args.tensors[t].blocks * args.tensors[t].block_bytes;
  // A thread is worth waking for about 128 KB, as in the other ops.
  const int64_t grain = row_bytes < 131072 ? 131072 / row_bytes : 1;
  const auto gather = NEOX_SELECT_ISA(gather);
  const auto work = [&](int64_t begin, int64_t end) { gather(args, begin, end); };
  if (args.rows_out <= grain) {
    work(0, args.rows_out);
  } else {
    torch::stable::parallel_for(0, args.rows_out, grain, work);
  }
}

// `kDense`: the tokens of a sequence are neighbours in the mask, so that the compiler counts them by vectors.
template <class Bits, bool kDense>
void find_tokens(MaskArgs args) {
  if constexpr (kDense) args.stride_seqlen = 1;
  int64_t total = 0, longest = 0;
  args.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    int32_t length = 0, invalid = 0;
    for (int64_t s = 0; s < args.seqlen; ++s) {
      const MaskValue value = mask_value<Bits>(args, b, s);
      length += value.token;
      invalid |= value.invalid;
    }
    require(invalid == 0, "varlen: attention_mask must hold only 0 and 1");
    total += length;
    longest = length > longest ? length : longest;
    args.cu_seqlens[b + 1] = static_cast<int32_t>(total);
  }
  require(total <= args.capacity, "varlen: attention_mask has more tokens than capacity");
  require(longest <= args.max_seqlen, "varlen: a sequence of attention_mask is longer than max_seqlen");

  int64_t n = 0;
  for (int64_t b = 0, i = 0; b < args.batch; ++b) {
    for (int64_t s = 0; s < args.seqlen; ++s, ++i) {
      const bool token = mask_value<Bits>(args, b, s).token;
      args.inverse[i] = token ? static_cast<int32_t>(n) : -1;
      if (token) args.indices[n++] = i;
    }
  }
  std::fill(args.indices + n, args.indices + args.capacity, int64_t{-1});
  args.facts[0] = total;
  args.facts[1] = longest;
  args.facts[2] = 0;
}

template <class Bits>
void find_tokens(const MaskArgs& args) {
  return args.stride_seqlen == 1 ? find_tokens<Bits, true>(args) : find_tokens<Bits, false>(args);
}

void launch_metadata(const MaskArgs& args, const Tensor&) {
  switch (args.element_size) {
    case 1: return find_tokens<uint8_t>(args);
    case 2: return find_tokens<uint16_t>(args);
    case 4: return find_tokens<uint32_t>(args);
    default: return find_tokens<uint64_t>(args);
  }
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CPU, m) { neox::register_varlen<neox::launch_gather, neox::launch_metadata>(m); }
#endif
