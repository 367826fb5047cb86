// Rotary embedding on the CPU: q, k and v of one call, by blocks of tokens. The work is memory traffic: every element is read
// once and written once, and cos and sin once per token.
#include "cpu/vec.h"
#include "rotary_args.h"

namespace neox {

constexpr int64_t kBlockTokens = 16;

// Rotates the tokens begin <= token < end; `scratch` holds kBlockTokens * 2 * rotary_dim floats.
NEOX_DECLARE_PER_ISA(void rotate_tokens(const RotaryArgs& args, int64_t begin, int64_t end, float* scratch))

namespace NEOX_CPU_ISA {
namespace {

// The token's cos and sin as the heads use them: in float32, sin with the sign of the direction, and for the interleaved
// form one entry per feature, [c0 c0 c1 c1 ...] and [-s0 s0 -s1 s1 ...].
template <class Table>
void prepare_row(const RotaryArgs& args, const Table* cos, const Table* sin, float* c, float* s) {
  const int64_t half = args.rotary_dim / 2;
  const float sign = args.conjugate ? -1.0f : 1.0f;
  if (args.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      float ci, si;
      store(&ci, load(cos + i, 1), 1);
      store(&si, load(sin + i, 1), 1);
      c[2 * i] = c[2 * i + 1] = ci;
      s[2 * i] = -sign * si;
      s[2 * i + 1] = sign * si;
    }
    return;
  }
  int64_t i = 0;
  for (; i + Vec::kSize <= half; i += Vec::kSize) {
    store(c + i, load(cos + i));
    store(s + i, load(sin + i));
  }
  if (i < half) {
    store(c + i, load(cos + i, half - i), half - i);
    store(s + i, load(sin + i, half - i), half - i);
  }
  if (args.conjugate) {
    for (i = 0; i < half; ++i) s[i] = -s[i];
  }
}

template <class T>
inline void rotate_half(const T* x, T* y, const float* c, const float* s, int64_t half) {
  int64_t i = 0;
  for (; i + Vec::kSize <= half; i += Vec::kSize) {
    const Vec a = load(x + i), b = load(x + half + i), ci = load(c + i), si = load(s + i);
    store(y + i, mul_sub(a, ci, mul(b, si)));
    store(y + half + i, mul_add(b, ci, mul(a, si)));
  }
  if (i < half) {
    const int64_t n = half - i;
    const Vec a = load(x + i, n), b = load(x + half + i, n), ci = load(c + i, n), si = load(s + i, n);
    store(y + i, mul_sub(a, ci, mul(b, si)), n);
    store(y + half + i, mul_add(b, ci, mul(a, si)), n);
  }
}

template <class T>
inline void rotate_pairs(const T* x, T* y, const float* c, const float* s, int64_t rotary_dim) {
  int64_t i = 0;
  for (; i + Vec::kSize <= rotary_dim; i += Vec::kSize) {
    const Vec a = load(x + i);
    store(y + i, mul_add(a, load(c + i), mul(swap_pairs(a), load(s + i))));
  }
  if (i < rotary_dim) {
    const int64_t n = rotary_dim - i;
    const Vec a = load(x + i, n);
    store(y + i, mul_add(a, load(c + i, n), mul(swap_pairs(a), load(s + i, n))), n);
  }
}

template <class T>
inline void rotate_head(const RotaryArgs& args, const T* x, T* y, int64_t rotary_dim, const float* c, const float* s) {
  if (args.interleaved) {
    rotate_pairs(x, y, c, s, rotary_dim);
  } else {
    rotate_half(x, y, c, s, rotary_dim / 2);
  }
  const int64_t pass_bytes = (args.head_dim - rotary_dim) * static_cast<int64_t>(sizeof(T));
  if (x != y && pass_bytes > 0) copy_bytes(y + rotary_dim, x + rotary_dim, pass_bytes);
}

// A token of the block that is being worked on, and its prepared cos and sin.
struct BlockToken {
  int64_t batch, row;
  bool padding;
};

template <class T>
void rotate_block(const RotaryArgs& args, const RotaryTensor& tensor, const BlockToken* tokens, int64_t ntokens,
                  const float* rows) {
  const T* x[kBlockTokens];
  T* y[kBlockTokens];
  int64_t rotary_dim[kBlockTokens];
  for (int64_t i = 0; i < ntokens; ++i) {
    const BlockToken& token = tokens[i];
    const int64_t row_out = tensor.append ? token.row + index_at(args.cache_seqlens, token.batch) : token.row;
    x[i] = static_cast<const T*>(tensor.in) + token.batch * tensor.in_stride_batch + token.row * tensor.in_stride_seqlen;
    y[i] = static_cast<T*>(tensor.out) + token.batch * tensor.out_stride_batch + row_out * tensor.out_stride_seqlen;
    rotary_dim[i] = tensor.rotate && !token.padding ? args.rotary_dim : 0;
  }
  const auto rotate = [&](int64_t i, int64_t head) {
    const float* c = rows + i * 2 * args.rotary_dim;
    rotate_head(args, x[i] + head * tensor.in_stride_head, y[i] + head * tensor.out_stride_head, rotary_dim[i], c,
                c + args.rotary_dim);
  };
  // Heads that lie far apart fall on the same cache sets; with many of them it pays to write several tokens of one head
  // before the next: 64 heads of 96 features took 1.5 times memcpy's time in place of 2.3. With few it is no gain.
  if (tensor.nheads >= 32 && tensor.out_stride_seqlen < tensor.out_stride_head) {
    for (int64_t head = 0; head < tensor.nheads; ++head) {
      for (int64_t i = 0; i < ntokens; ++i) rotate(i, head);
    }
  } else {
    for (int64_t i = 0; i < ntokens; ++i) {
      for (int64_t head = 0; head < tensor.nheads; ++head) rotate(i, head);
    }
  }
}

template <class T>
void rotate_range(const RotaryArgs& args, int64_t begin, int64_t end, float* rows) {
  BlockToken tokens[kBlockTokens];
  int64_t batch = begin / args.seqlen, row = begin % args.seqlen;
  while (begin < end) {
    const int64_t ntokens = end - begin < kBlockTokens ? end - begin : kBlockTokens;
    for (int64_t i = 0; i < ntokens; ++i) {
      const RotaryToken token = locate_token(args, batch, row);
      tokens[i] = {batch, row, token.padding};
      const int64_t cos_at = token.batch * args.cos_stride_batch + token.position * args.cos_stride_position;
      const int64_t sin_at = token.batch * args.sin_stride_batch + token.position * args.sin_stride_position;
      float *c = rows + i * 2 * args.rotary_dim, *s = c + args.rotary_dim;
      if (token.padding) {
        // No table row: it is copied.
      } else if (args.table_is_float32) {
        prepare_row(args, static_cast<const float*>(args.cos) + cos_at, static_cast<const float*>(args.sin) + sin_at, c, s);
      } else {
        prepare_row(args, static_cast<const T*>(args.cos) + cos_at, static_cast<const T*>(args.sin) + sin_at, c, s);
      }
      if (++row == args.seqlen) {
        row = 0;
        ++batch;
      }
    }
    for (int32_t t = 0; t < args.ntensors; ++t) rotate_block<T>(args, args.tensors[t], tokens, ntokens, rows);
    begin += ntokens;
  }
}

}  // namespace

void rotate_tokens(const RotaryArgs& args, int64_t begin, int64_t end, float* scratch) {
  switch (args.dtype) {
    case Dtype::kFloat32: return rotate_range<float>(args, begin, end, scratch);
    case Dtype::kBFloat16: return rotate_range<bf16>(args, begin, end, scratch);
    case Dtype::kFloat16: return rotate_range<fp16>(args, begin, end, scratch);
  }
}

}  // namespace NEOX_CPU_ISA
}  // namespace neox

#if defined(NEOX_CPU_DEFAULT)
#include <vector>

#include "rotary_ops.h"

namespace neox {
namespace {

[[noreturn]] void raise_position(int64_t batch, int64_t row, int64_t position, int64_t max_position) {
  throw std::out_of_range("position " + std::to_string(position) + " of token (" + std::to_string(batch) + ", " +
                          std::to_string(row) + ") is outside the tables, which hold positions 0 to " +
                          std::to_string(max_position - 1));
}

// Every position and every cache row, before anything is written.
void check_range(const RotaryArgs& args, int64_t rows) {
  if (args.cu_seqlens.data != nullptr) {
    int64_t previous = index_at(args.cu_seqlens, 0);
    bool ordered = previous == 0;
    for (int64_t b = 1; b <= args.batch; ++b) {
      const int64_t next = index_at(args.cu_seqlens, b);
      ordered = ordered && next >= previous;
      previous = next;
    }
    require(ordered && previous <= args.seqlen, "cu_seqlens must start at 0, never fall, and end at or below total");
  }
  if (args.position_ids.data == nullptr && args.cu_seqlens.data == nullptr) {
    // Positions of a sequence are consecutive: its first and its last tell all.
    const bool one_range = args.seqlen_offsets.data == nullptr;
    for (int64_t b = 0; b < (one_range ? 1 : rows); ++b) {
      for (const int64_t row : {int64_t{0}, args.seqlen - 1}) {
        const int64_t p = locate_token(args, b, row).position;
        if (p < 0 || p >= args.max_position) raise_position(b, row, p, args.max_position);
      }
    }
  } else {
    const bool one_row = args.position_ids.data != nullptr && args.position_stride_batch == 0;
    for (int64_t b = 0; b < (one_row ? 1 : rows); ++b) {
      for (int64_t row = 0; row < args.seqlen; ++row) {
        const RotaryToken token = locate_token(args, b, row);
        if (!token.padding && (token.position < 0 || token.position >= args.max_position)) {
          raise_position(b, row, token.position, args.max_position);
        }
      }
    }
  }
  if (args.cache_seqlens.data != nullptr) {
    for (int64_t b = 0; b < rows; ++b) {
      const int64_t used = index_at(args.cache_seqlens, b);
      if (used < 0 || used > args.cache_length - args.seqlen) {
        throw std::out_of_range("cache_seqlens[" + std::to_string(b) + "] is " + std::to_string(used) + ", and " +
                                std::to_string(args.seqlen) + " more tokens do not fit a cache of length " +
                                std::to_string(args.cache_length));
      }
    }
  }
}

void launch(const RotaryArgs& args, const Tensor&) {
  const int64_t rows = args.cu_seqlens.data != nullptr ? 1 : args.batch;
  const int64_t tokens = rows * args.seqlen;
  if (tokens == 0) return;
  check_range(args, rows);
  int64_t heads = 0;
  for (int32_t t = 0; t < args.ntensors; ++t) heads += args.tensors[t].nheads;
  // A thread is worth waking for about 32k elements (some 10 us of work).
  const int64_t elements = heads * args.head_dim > 0 ? heads * args.head_dim : 1;
  const int64_t grain = elements < 32768 ? 32768 / elements : 1;
  const auto rotate = NEOX_SELECT_ISA(rotate_tokens);
  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t block = end - begin < kBlockTokens ? end - begin : kBlockTokens;
    std::vector<float> scratch(static_cast<size_t>(block * 2 * args.rotary_dim));
    rotate(args, begin, end, scratch.data());
  };
  if (tokens <= grain) {
    work(0, tokens);
  } else {
    torch::stable::parallel_for(0, tokens, grain, work);
  }
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CPU, m) { neox::register_rotary<neox::launch>(m); }
#endif
