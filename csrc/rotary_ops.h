// The rotary ops on torch tensors, written once for CPU and CUDA: they check the call, describe it as RotaryArgs, allocate,
// and hand over to `launch`. The checks are complete, so that Python needs none of its own before a call; what it says when
// one of these refuses is more detailed.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rotary_args.h"
#include "tensors.h"

namespace neox {

using LaunchRotary = void (*)(const RotaryArgs&, const Tensor& like);

// The bits of a schema's `flags`.
enum RotaryFlags : int64_t { kInterleaved = 1, kHeadsFirst = 2, kConjugate = 4 };

// The dimensions of x that count sequences (-1: none), tokens and heads.
struct Axes {
  int64_t batch, seqlen, nheads;
  Axes(const Tensor& x, int64_t flags) : batch(-1), seqlen(0), nheads(1) {
    if (x.dim() == 4) {
      batch = 0;
      seqlen = flags & kHeadsFirst ? 2 : 1;
      nheads = 3 - seqlen;
    }
  }
};

inline RotaryTensor describe(const Tensor& in, const Tensor& out, int64_t flags, bool rotate = true, bool append = false) {
  const Axes axes(in, flags);
  const auto i = in.strides(), o = out.strides();
  RotaryTensor t{};
  t.in = in.const_data_ptr();
  t.out = out.mutable_data_ptr();
  t.in_stride_batch = axes.batch < 0 ? 0 : i[axes.batch];
  t.out_stride_batch = axes.batch < 0 ? 0 : o[axes.batch];
  t.in_stride_seqlen = i[axes.seqlen];
  t.out_stride_seqlen = o[axes.seqlen];
  t.in_stride_head = i[axes.nheads];
  t.out_stride_head = o[axes.nheads];
  t.nheads = in.size(axes.nheads);
  t.rotate = rotate;
  t.append = append;
  return t;
}

inline void set_tables(RotaryArgs& args, const Tensor& cos, const Tensor& sin, ScalarType type, const Place& place) {
  const int64_t dims = cos.dim();
  require((dims == 2 || dims == 3) && sin.dim() == dims, "rotary: cos and sin must have 2 or 3 dimensions");
  for (int64_t d = 0; d < dims; ++d) require(cos.size(d) == sin.size(d), "rotary: cos and sin must have the same shape");
  const ScalarType table_type = cos.scalar_type();
  require((table_type == ScalarType::Float || table_type == type) && sin.scalar_type() == table_type,
          "rotary: cos and sin must be float32 or of the dtype of x");
  require(Place(cos) == place && Place(sin) == place, "rotary: cos and sin must be on the device of x");
  args.rotary_dim = 2 * cos.size(dims - 1);
  require(args.rotary_dim <= args.head_dim, "rotary: rotary_dim must not exceed head_dim");
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.table_is_float32 = table_type == ScalarType::Float;
  args.max_position = cos.size(dims - 2);
  args.cos_stride_position = cos.stride(dims - 2);
  args.sin_stride_position = sin.stride(dims - 2);
  if (dims == 3) {
    require(cos.size(1) == args.seqlen && (cos.size(0) == 1 || cos.size(0) == args.batch),
            "rotary: gathered cos and sin must be (1 or batch, seqlen, rotary_dim / 2)");
    args.cos_stride_batch = cos.size(0) == 1 ? 0 : cos.stride(0);
    args.sin_stride_batch = cos.size(0) == 1 ? 0 : sin.stride(0);
  }
}

inline RotaryArgs make_args(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& position_ids,
                            const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens, int64_t offset,
                            int64_t flags) {
  require(x.dim() == 4 || x.dim() == 3, "rotary: x must have 3 or 4 dimensions");
  require(flags >= 0 && flags < 8, "rotary: flags must be a sum of 1, 2 and 4");
  const Axes axes(x, flags);
  const Place place(x);
  const bool flat = axes.batch < 0;
  RotaryArgs args{};
  const ScalarType type = x.scalar_type();
  args.dtype = dtype_of(type, "rotary: x must be float32, bfloat16 or float16");
  args.batch = flat ? 1 : x.size(axes.batch);
  args.seqlen = x.size(axes.seqlen);
  args.head_dim = x.size(x.dim() - 1);
  args.offset = offset;
  args.interleaved = flags & kInterleaved;
  args.conjugate = flags & kConjugate;
  set_tables(args, cos, sin, type, place);

  const bool has_positions = position_ids.has_value() || seqlen_offsets.has_value() || offset != 0;
  require(cos.dim() == 2 || !(flat || has_positions), "rotary: gathered cos and sin leave nothing to say of positions");
  require(!position_ids.has_value() || !(seqlen_offsets.has_value() || offset != 0),
          "rotary: position_ids and seqlen_offsets exclude each other");
  require(!flat || !(flags & kHeadsFirst), "rotary: x of (total, nheads, head_dim) is never heads first");
  require(!flat || position_ids.has_value() || cu_seqlens.has_value(),
          "rotary: x of (total, nheads, head_dim) needs cu_seqlens or position_ids");
  if (position_ids.has_value()) {
    const Tensor& ids = *position_ids;
    args.position_ids = indices_of(ids, place, "rotary: position_ids must be int32 or int64 on the device of x");
    const int64_t last = ids.dim() - 1;
    require(last == 0 || (last == 1 && !flat && (ids.size(0) == 1 || ids.size(0) == args.batch)),
            "rotary: position_ids must be (seqlen,) or (1 or batch, seqlen)");
    require(ids.size(last) == args.seqlen, "rotary: position_ids must have seqlen columns");
    args.position_stride_seqlen = ids.stride(last);
    args.position_stride_batch = last == 1 && ids.size(0) > 1 ? ids.stride(0) : 0;
  }
  if (cu_seqlens.has_value()) {
    require(flat, "rotary: cu_seqlens goes with x of (total, nheads, head_dim)");
    require(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 && cu_seqlens->is_contiguous(),
            "rotary: cu_seqlens must be a contiguous (batch + 1,)");
    args.cu_seqlens = indices_of(*cu_seqlens, place, "rotary: cu_seqlens must be int32 or int64 on the device of x");
    args.batch = cu_seqlens->size(0) - 1;
  }
  if (seqlen_offsets.has_value()) {
    require(seqlen_offsets->dim() == 1 && seqlen_offsets->size(0) == args.batch && seqlen_offsets->is_contiguous(),
            "rotary: seqlen_offsets must be a contiguous (batch,)");
    args.seqlen_offsets =
        indices_of(*seqlen_offsets, place, "rotary: seqlen_offsets must be int32 or int64 on the device of x");
  }
  return args;
}

// y (k, v) against x (q): the same but for the number of heads.
inline void require_same_tokens(const Tensor& x, const Tensor& y, int64_t flags) {
  const Axes axes(x, flags);
  bool same = x.dim() == y.dim() && x.scalar_type() == y.scalar_type() && Place(x) == Place(y);
  for (int64_t d = 0; same && d < x.dim(); ++d) same = d == axes.nheads || x.size(d) == y.size(d);
  require(same, "rotary: q, k and v must share dtype, device and shape but for the heads");
}

template <LaunchRotary launch>
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& position_ids,
              const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens, int64_t offset, int64_t flags) {
  const Tensor in = with_contiguous_last_dim(x), c = with_contiguous_last_dim(cos), s = with_contiguous_last_dim(sin);
  RotaryArgs args = make_args(in, c, s, position_ids, seqlen_offsets, cu_seqlens, offset, flags);
  Tensor out = empty_contiguous_like(in);
  args.tensors[0] = describe(in, out, flags);
  args.ntensors = 1;
  launch(args, in);
  return out;
}

template <LaunchRotary launch>
std::tuple<Tensor, Tensor> rotary_qk(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                     const OptionalTensor& position_ids, const OptionalTensor& seqlen_offsets,
                                     const OptionalTensor& cu_seqlens, int64_t offset, int64_t flags) {
  const Tensor q_in = with_contiguous_last_dim(q), k_in = with_contiguous_last_dim(k);
  const Tensor c = with_contiguous_last_dim(cos), s = with_contiguous_last_dim(sin);
  RotaryArgs args = make_args(q_in, c, s, position_ids, seqlen_offsets, cu_seqlens, offset, flags);
  require_same_tokens(q, k, flags);
  Tensor q_out = empty_contiguous_like(q_in), k_out = empty_contiguous_like(k_in);
  args.tensors[0] = describe(q_in, q_out, flags);
  args.tensors[1] = describe(k_in, k_out, flags);
  args.ntensors = 2;
  launch(args, q_in);
  return {q_out, k_out};
}

template <LaunchRotary launch>
void rotary_inplace(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& position_ids,
                    const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens, int64_t offset,
                    int64_t flags) {
  const Tensor c = with_contiguous_last_dim(cos), s = with_contiguous_last_dim(sin);
  RotaryArgs args = make_args(x, c, s, position_ids, seqlen_offsets, cu_seqlens, offset, flags);
  require_writable(x);
  args.tensors[0] = describe(x, x, flags);
  args.ntensors = 1;
  launch(args, x);
}

template <LaunchRotary launch>
void rotary_qk_inplace(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                       const OptionalTensor& position_ids, const OptionalTensor& seqlen_offsets,
                       const OptionalTensor& cu_seqlens, int64_t offset, int64_t flags) {
  const Tensor c = with_contiguous_last_dim(cos), s = with_contiguous_last_dim(sin);
  RotaryArgs args = make_args(q, c, s, position_ids, seqlen_offsets, cu_seqlens, offset, flags);
  require_same_tokens(q, k, flags);
  require_writable(q);
  require_writable(k);
  args.tensors[0] = describe(q, q, flags);
  args.tensors[1] = describe(k, k, flags);
  require(args.tensors[0].out != args.tensors[1].out || q.numel() == 0, "rotary: q and k must not be the same memory");
  args.ntensors = 2;
  launch(args, q);
}

template <LaunchRotary launch>
Tensor rotary_kv_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& cos, const Tensor& sin, const Tensor& cache_seqlens,
                        const OptionalTensor& position_ids, int64_t flags) {
  require(q.dim() == 4 && cos.dim() == 2, "rotary: q must have 4 dimensions, and cos and sin 2");
  const Tensor q_in = with_contiguous_last_dim(q), k_in = with_contiguous_last_dim(k), v_in = with_contiguous_last_dim(v);
  const Tensor c = with_contiguous_last_dim(cos), s = with_contiguous_last_dim(sin);
  require(cache_seqlens.dim() == 1 && cache_seqlens.size(0) == q.size(0) && cache_seqlens.is_contiguous(),
          "rotary: cache_seqlens must be a contiguous (batch,)");
  const OptionalTensor offsets = position_ids.has_value() ? OptionalTensor{} : OptionalTensor{cache_seqlens};
  RotaryArgs args = make_args(q_in, c, s, position_ids, offsets, OptionalTensor{}, 0, flags & ~int64_t{kConjugate});
  require_same_tokens(q, k, flags);
  require_same_tokens(q, v, flags);
  const Axes axes(k, flags);
  require(k.size(axes.nheads) == v.size(axes.nheads), "rotary: k and v must have the same shape");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    bool fits = cache->dim() == 4 && cache->scalar_type() == q.scalar_type() && Place(*cache) == Place(q) &&
                cache->size(axes.seqlen) == k_cache.size(axes.seqlen);
    for (int64_t d = 0; fits && d < 4; ++d) fits = d == axes.seqlen || cache->size(d) == k.size(d);
    require(fits, "rotary: the caches must have the dtype, device and shape of k but for one length");
    require_writable(*cache);
  }
  args.cache_seqlens = indices_of(cache_seqlens, Place(q), "rotary: cache_seqlens must be int32 or int64 on the device of q");
  args.cache_length = k_cache.size(axes.seqlen);
  Tensor q_out = empty_contiguous_like(q_in);
  args.tensors[0] = describe(q_in, q_out, flags);
  args.tensors[1] = describe(k_in, k_cache, flags, /*rotate=*/true, /*append=*/true);
  args.tensors[2] = describe(v_in, v_cache, flags, /*rotate=*/false, /*append=*/true);
  args.ntensors = 3;
  launch(args, q_in);
  return q_out;
}

template <LaunchRotary launch>
void register_rotary(torch::stable::detail::StableLibrary& m) {
  m.impl("rotary", TORCH_BOX(&rotary<launch>));
  m.impl("rotary_qk", TORCH_BOX(&rotary_qk<launch>));
  m.impl("rotary.inference", TORCH_BOX(&rotary<launch>));
  m.impl("rotary_qk.inference", TORCH_BOX(&rotary_qk<launch>));
  m.impl("rotary_", TORCH_BOX(&rotary_inplace<launch>));
  m.impl("rotary_qk_", TORCH_BOX(&rotary_qk_inplace<launch>));
  m.impl("rotary_kv_append", TORCH_BOX(&rotary_kv_append<launch>));
}

}  // namespace neox
