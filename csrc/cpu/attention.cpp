// Causal attention on the CPU in one pass: a block of queries meets the keys step by step, and scores never leave the cache
// (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). Only where attention_blocks.h has products:
// float32 with AVX-512, bfloat16 with AMX.
#include "cpu/attention_blocks.h"

namespace neox {

NEOX_DECLARE_PER_ISA(void causal_attention(const AttentionArgs& args, float* scratch, int64_t begin, int64_t end))

namespace NEOX_CPU_ISA {

#if !defined(__AVX512F__)

void causal_attention(const AttentionArgs&, float*, int64_t, int64_t) {}

#else
namespace {

// A row of n elements in blocks beside each other: calls step(place, lanes) vector by vector.
template <class Step>
inline void for_row(int64_t n, const Step& step) {
  int64_t at = 0;
  for (; n >= kBlock; n -= kBlock, at += kArea) {
    for (int64_t c = 0; c < kBlock; c += kLanes) step(at + c, kLanes);
  }
  for (; n >= kLanes; n -= kLanes, at += kLanes) step(at, kLanes);
  if (n > 0) step(at, n);
}

// The largest of a row's first n scores.
inline float largest_of(const float* row, int64_t n) {
  Vec largest = broadcast(-kInfinity);
  for_row(n, [&](int64_t at, int64_t lanes) {
    const Vec x = load(row + at);
    largest = max(lanes == kLanes ? x : first_of(x, lanes, largest), largest);
  });
  return max(largest);
}

inline void store_exponential(float* p, Vec x) { store(p, x); }
#if defined(__AVX512BF16__)
// Without the look for subnormal numbers that store() takes: exp2 gives none.
inline void store_exponential(bf16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
}
#endif

// 2^(score * factor - shift) of a row's first n scores, and zeros up to `whole`; gives their sum.
template <class T>
inline float exponentials(const float* row, int64_t n, int64_t whole, Vec factor, Vec extra, float shift, T* out) {
  const Vec most = broadcast(shift), zero = broadcast(0.0f);
  Vec total = zero;
  for_row(n, [&](int64_t at, int64_t lanes) {
    Vec e = exp2(mul_sub(load(row + at), factor, most), extra);
    if (lanes < kLanes) e = first_of(e, lanes, zero);
    total = add(total, e);
    store_exponential(out + at, e);
  });
  for (int64_t i = (n + kLanes - 1) / kLanes * kLanes; i < whole; i += kLanes) {
    store_exponential(out + i / kBlock * kArea + i % kBlock, zero);
  }
  return sum(total);
}

template <class T>
const T* head_of(const Heads& x, int64_t b, int64_t head) {
  return static_cast<const T*>(x.data) + b * x.stride_batch + head * x.stride_head;
}

// What a thread works in.
template <class T>
struct Scratch {
  float *out, *scores;
  T *queries, *probs, *keys, *values;

  Scratch(float* memory, int64_t wide, int64_t key_blocks) {
    out = memory;
    scores = out + wide * kArea;
    queries = reinterpret_cast<T*>(scores + kStep * kArea);
    probs = queries + wide * kArea;
    keys = probs + kStep * kArea;
    values = keys + wide * key_blocks * kArea;
  }
};

template <class T>
void attend(const AttentionArgs& args, const Scratch<T>& scratch, int64_t b, int64_t head, int64_t first) {
  const int64_t wide = blocks_of(args.head_dim), rows = first + kBlock < args.q_len ? kBlock : args.q_len - first;
  const T* q = head_of<T>(args.q, b, head) + first * args.q.stride_seq;
  for (int64_t c = 0; c < wide; ++c) {
    pack_left(q + c * kBlock, args.q.stride_seq, rows, args.head_dim - c * kBlock, scratch.queries + c * kArea);
  }
  const double exact = args.scale * kLog2E;
  const float rounded = static_cast<float>(exact);
  const Vec factor = broadcast(rounded), extra = broadcast(static_cast<float>((exact - rounded) / rounded));
  const auto seen = [&](int64_t r) { return first + r + 1 + args.k_len - args.q_len; };  // keys, by a query
  float largest[kBlock], sums[kBlock];
  for (int64_t r = 0; r < kBlock; ++r) largest[r] = -kInfinity, sums[r] = 0.0f;
  const int64_t all = seen(rows - 1) > 0 ? blocks_of(seen(rows - 1)) : 0;
  for (int64_t start = 0; start < all; start += kStep) {
    const int64_t count = all - start < kStep ? all - start : kStep, whole = count * kBlock;
    for (int64_t j = 0; j < count; ++j) {
      const T* keys = scratch.keys + (start + j) * wide * kArea;
      multiply(scratch.queries, keys, 1, wide, scratch.scores + j * kArea, false);
    }
    for (int64_t r = 0; r < kBlock; ++r) {
      int64_t n = r < rows ? seen(r) - start * kBlock : 0;
      n = n < 0 ? 0 : n > whole ? whole : n;
      const float* row = scratch.scores + r * kBlock;
      const float before = largest[r], here = largest_of(row, n) * rounded;
      largest[r] = here > before ? here : before;
      const float shift = largest[r] == -kInfinity ? 0.0f : largest[r];
      const float added = exponentials(row, n, whole, factor, extra, shift, scratch.probs + r * kBlock);
      const float less = start > 0 ? __builtin_exp2f(before - shift) : 1.0f;
      sums[r] = sums[r] * less + added;
      if (less != 1.0f) {
        for_row(wide * kBlock, [&](int64_t at, int64_t) {
          float* out = scratch.out + r * kBlock + at;
          store(out, mul(load(out), broadcast(less)));
        });
      }
    }
    for (int64_t c = 0; c < wide; ++c) {
      const T* values = scratch.values + (start * wide + c) * kArea;
      multiply(scratch.probs, values, wide, count, scratch.out + c * kArea, start > 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* to = static_cast<T*>(args.out) + ((b * args.q_len + first + r) * args.nheads + head) * args.head_dim;
    const bool dead = all == 0 || sums[r] == 0.0f;  // sees no key
    const Vec part = broadcast(dead ? 0.0f : 1.0f / sums[r]);
    for_row(args.head_dim, [&](int64_t at, int64_t lanes) {
      const Vec x = dead ? part : mul(load(scratch.out + r * kBlock + at), part);
      store_some(to + at / kArea * kBlock + at % kArea, x, lanes);
    });
  }
}

// Blocks of queries begin to end, counted through batch and heads.
template <class T>
void attend_blocks(const AttentionArgs& args, float* memory, int64_t begin, int64_t end) {
  const int64_t wide = blocks_of(args.head_dim), q_blocks = blocks_of(args.q_len), k_blocks = blocks_of(args.k_len);
  const Scratch<T> scratch(memory, wide, k_blocks);
  begin_products(T{});
  int64_t packed = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i / q_blocks, b = at / args.nheads, head = at % args.nheads;
    if (packed != at) {
      packed = at;
      for (int64_t j = 0; j < k_blocks * wide; ++j) {
        const int64_t key = j / wide * kBlock, c = j % wide * kBlock, rows = args.k_len - key, columns = args.head_dim - c;
        const T* k = head_of<T>(args.k, b, head) + key * args.k.stride_seq + c;
        const T* v = head_of<T>(args.v, b, head) + key * args.v.stride_seq + c;
        pack_keys(k, args.k.stride_seq, rows, columns, scratch.keys + j * kArea);
        pack_values(v, args.v.stride_seq, rows, columns, scratch.values + j * kArea);
      }
    }
    attend(args, scratch, b, head, i % q_blocks * kBlock);
  }
  end_products(T{});
}

}  // namespace

void causal_attention(const AttentionArgs& args, float* scratch, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::kFloat32) return attend_blocks<float>(args, scratch, begin, end);
#if defined(__AVX512BF16__)
  attend_blocks<bf16>(args, scratch, begin, end);
#endif
}

#endif  // __AVX512F__
}  // namespace NEOX_CPU_ISA
}  // namespace neox

#if defined(NEOX_CPU_DEFAULT)
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <memory>
#include <new>

#include "tensors.h"

namespace neox {
namespace {

// Whether bfloat16 tiles may be used: the processor has them, and Linux grants their state to processes that ask.
bool has_amx() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  static const bool granted = [] {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

bool serves_causal_attention(ScalarType dtype) {
  const Isa isa = current_isa();
  if (dtype == ScalarType::Float) return isa >= Isa::kAvx512;
  return dtype == ScalarType::BFloat16 && isa == Isa::kAvx512Bf16 && has_amx();
}

Heads heads_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor causal_attention_of(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, double scale) {
  require(given_q.dim() == 4 && given_k.dim() == 4 && given_v.dim() == 4,
          "causal_attention: q, k and v must be (batch, seqlen, nheads, head_dim)");
  const ScalarType type = given_q.scalar_type();
  require(given_k.scalar_type() == type && given_v.scalar_type() == type && serves_causal_attention(type),
          "causal_attention: q, k and v must be of one dtype that serves_causal_attention takes");
  require(scale > 0, "causal_attention: scale must be above zero");
  for (int64_t d = 0; d < 4; ++d) {
    require((d == 1 || given_k.size(d) == given_q.size(d)) && given_v.size(d) == given_k.size(d),
            "causal_attention: q, k and v must agree but for the seqlen of q");
  }
  const Tensor q = with_contiguous_last_dim(given_q), k = with_contiguous_last_dim(given_k);
  const Tensor v = with_contiguous_last_dim(given_v);
  Tensor out = empty_contiguous_like(q);
  AttentionArgs args{q.size(0), q.size(2), q.size(1), k.size(1), q.size(3), heads_of(q), heads_of(k), heads_of(v),
                     out.mutable_data_ptr(), dtype_of(type, ""), scale};
  const int64_t blocks = args.batch * args.nheads * blocks_of(args.q_len);
  if (out.numel() == 0) return out;
  const auto causal_attention = NEOX_SELECT_ISA(causal_attention);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    struct Free {
      void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    const size_t bytes = static_cast<size_t>(scratch_of(args)) * sizeof(float);
    const std::unique_ptr<float, Free> scratch(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
    causal_attention(args, scratch.get(), begin, end);
  });
  return out;
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CPU, m) { m.impl("causal_attention", TORCH_BOX(&neox::causal_attention_of)); }
STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CompositeExplicitAutograd, m) {
  m.impl("serves_causal_attention", TORCH_BOX(&neox::serves_causal_attention));
}
#endif
