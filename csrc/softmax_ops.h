// The softmax ops on torch tensors, written once for CPU and CUDA: they check the call completely, describe it as
// SoftmaxArgs, allocate, and hand over to `launch`.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "softmax_args.h"
#include "tensors.h"

namespace neox {

using LaunchSoftmax = void (*)(const SoftmaxArgs&, const Tensor& like);

// The bits of a schema's `flags`: whether the mask is causal, the dtype of the result in two bits (0: that of the scores
// or of the gradient), and in the backward whether the sums for the head mask's gradient are wanted.
enum SoftmaxFlags : int64_t { kCausal = 1, kDtypeShift = 1, kRowDots = 8 };

inline ScalarType result_type(int64_t flags, ScalarType otherwise) {
  require(flags >= 0 && flags < 16, "causal_softmax: flags must be a sum of 1, 2 or 4 or 6, and 8");
  switch ((flags >> kDtypeShift) & 3) {
    case 1: return ScalarType::Float;
    case 2: return ScalarType::BFloat16;
    case 3: return ScalarType::Half;
    default: return otherwise;
  }
}

inline Scores describe_scores(const Tensor& x, void* data) {
  Scores s{};
  s.data = data;
  s.dtype = dtype_of(x.scalar_type(), "causal_softmax: scores must be float32, bfloat16 or float16");
  s.stride_batch = x.stride(0);
  s.stride_head = x.stride(1);
  s.stride_q = x.stride(2);
  return s;
}

inline Scores read_from(const Tensor& x) { return describe_scores(x, const_cast<void*>(x.const_data_ptr())); }
inline Scores written_to(const Tensor& x) { return describe_scores(x, x.mutable_data_ptr()); }

// Strides of x as a tensor over `sizes`, to which it broadcasts.
inline void broadcast_strides(const Tensor& x, const int64_t* sizes, int64_t dims, int64_t* strides, const char* message) {
  const int64_t missing = dims - x.dim();
  require(missing >= 0, message);
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = d < missing ? 1 : x.size(d - missing);
    require(size == 1 || size == sizes[d], message);
    strides[d] = size == 1 ? 0 : x.stride(d - missing);
  }
}

inline void set_head_mask(SoftmaxArgs& args, const OptionalTensor& head_mask, const Place& place) {
  if (!head_mask.has_value()) return;
  const char* message = "causal_softmax: head_mask must be (nheads,) or broadcast to (batch, nheads, 1, 1)";
  require(Place(*head_mask) == place, "causal_softmax: head_mask must be on the device of the scores");
  args.head_mask = head_mask->const_data_ptr();
  args.head_mask_dtype = dtype_of(head_mask->scalar_type(), "causal_softmax: head_mask must be floating");
  if (head_mask->dim() == 1) {
    broadcast_strides(*head_mask, &args.nheads, 1, &args.head_mask_stride_head, message);
    return;
  }
  const int64_t sizes[4] = {args.batch, args.nheads, 1, 1};
  int64_t strides[4];
  broadcast_strides(*head_mask, sizes, 4, strides, message);
  args.head_mask_stride_batch = strides[0];
  args.head_mask_stride_head = strides[1];
}

inline void set_dropout(SoftmaxArgs& args, const OptionalTensor& rng, double dropout_p, const Place& place) {
  require(dropout_p >= 0 && dropout_p <= 1, "causal_softmax: dropout_p must be between 0 and 1");
  const char* message = "causal_softmax: rng must be a contiguous (2,) int64 on the device of the scores";
  require(!rng.has_value() || (rng->dim() == 1 && rng->size(0) == 2 && rng->scalar_type() == ScalarType::Long &&
                               rng->is_contiguous() && Place(*rng) == place),
          message);
  if (dropout_p == 0) return;
  require(rng.has_value(), message);
  args.rng = static_cast<const int64_t*>(rng->const_data_ptr());
  args.dropout_threshold = dropout_p < 1 ? static_cast<uint32_t>(dropout_p * 4294967296.0) : 0xffffffffu;
  args.keep_scale = dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.0f;
}

// What forward and backward share; x is the scores, or what has their shape.
inline SoftmaxArgs make_softmax_args(const Tensor& x, double scale, const OptionalTensor& head_mask,
                                     const OptionalTensor& rng, double dropout_p, int64_t flags) {
  require(x.dim() == 4, "causal_softmax: scores must be (batch, nheads, q_len, k_len)");
  SoftmaxArgs args{};
  args.batch = x.size(0);
  args.nheads = x.size(1);
  args.q_len = x.size(2);
  args.k_len = x.size(3);
  args.scale = static_cast<float>(scale);
  args.causal = flags & kCausal;
  args.keep_scale = 1.0f;
  const Place place(x);
  set_head_mask(args, head_mask, place);
  set_dropout(args, rng, dropout_p, place);
  return args;
}

inline void set_masks(SoftmaxArgs& args, const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask,
                      const Place& place) {
  if (key_padding_mask.has_value()) {
    const Tensor& mask = *key_padding_mask;
    require(mask.dim() == 2 && mask.size(0) == args.batch && mask.size(1) == args.k_len &&
                mask.scalar_type() == ScalarType::Bool && Place(mask) == place,
            "causal_softmax: key_padding_mask must be a bool (batch, k_len) on the device of the scores");
    args.key_padding = static_cast<const bool*>(mask.const_data_ptr());
    args.key_padding_stride_batch = mask.stride(0);
    args.key_padding_stride_k = mask.stride(1);
  }
  if (attn_mask.has_value()) {
    const Tensor& mask = *attn_mask;
    require(Place(mask) == place, "causal_softmax: attn_mask must be on the device of the scores");
    args.attn_mask.data = mask.const_data_ptr();
    if (mask.scalar_type() == ScalarType::Bool) {
      args.attn_mask.kind = MaskKind::kBool;
    } else {
      args.attn_mask.kind = MaskKind::kFloat;
      args.attn_mask.dtype = dtype_of(mask.scalar_type(), "causal_softmax: attn_mask must be bool or floating");
    }
    const int64_t sizes[4] = {args.batch, args.nheads, args.q_len, args.k_len};
    int64_t strides[4];
    broadcast_strides(mask, sizes, 4, strides, "causal_softmax: attn_mask must broadcast to the scores");
    args.attn_mask.stride_batch = strides[0];
    args.attn_mask.stride_head = strides[1];
    args.attn_mask.stride_q = strides[2];
    args.attn_mask.stride_k = strides[3];
  }
}

// The result, and behind dropout or a head mask the probabilities before them, which the backward needs; else no elements.
template <LaunchSoftmax launch>
std::tuple<Tensor, Tensor> softmax(const Tensor& scores, double scale, const OptionalTensor& key_padding_mask,
                                   const OptionalTensor& attn_mask, const OptionalTensor& head_mask,
                                   const OptionalTensor& rng, double dropout_p, int64_t flags) {
  const Tensor x = with_contiguous_last_dim(scores);
  SoftmaxArgs args = make_softmax_args(x, scale, head_mask, rng, dropout_p, flags);
  const Place place(x);
  set_masks(args, key_padding_mask, attn_mask, place);
  args.scores = read_from(x);
  const ScalarType type = result_type(flags, x.scalar_type());
  const auto sizes = x.sizes();
  const int64_t none = 0;
  const bool separate = dropout_p > 0 || head_mask.has_value();  // not by its data, which an empty tensor has none of
  Tensor out = empty_contiguous(sizes.data(), 4, type, place);
  Tensor probs = separate ? empty_contiguous(sizes.data(), 4, type, place) : empty_contiguous(&none, 1, type, place);
  args.out = written_to(out);
  if (separate) args.probs = written_to(probs);
  launch(args, x);
  return {out, probs};
}

template <LaunchSoftmax launch>
Tensor softmax_inference(const Tensor& scores, double scale, const OptionalTensor& key_padding_mask,
                         const OptionalTensor& attn_mask, const OptionalTensor& head_mask, const OptionalTensor& rng,
                         double dropout_p, int64_t flags) {
  const Tensor x = with_contiguous_last_dim(scores);
  SoftmaxArgs args = make_softmax_args(x, scale, head_mask, rng, dropout_p, flags);
  const Place place(x);
  set_masks(args, key_padding_mask, attn_mask, place);
  args.scores = read_from(x);
  Tensor out = empty_contiguous(x.sizes().data(), 4, result_type(flags, x.scalar_type()), place);
  args.out = written_to(out);
  launch(args, x);
  return out;
}

template <LaunchSoftmax launch>
void softmax_inplace(const Tensor& scores, double scale, const OptionalTensor& key_padding_mask,
                     const OptionalTensor& attn_mask, const OptionalTensor& head_mask, const OptionalTensor& rng,
                     double dropout_p, int64_t flags) {
  const OptionalTensor heads = apart_from(head_mask, scores), padding = apart_from(key_padding_mask, scores);
  const OptionalTensor mask = apart_from(attn_mask, scores);
  SoftmaxArgs args = make_softmax_args(scores, scale, heads, rng, dropout_p, flags);
  require_writable(scores);
  require(result_type(flags, scores.scalar_type()) == scores.scalar_type(),
          "causal_softmax: in place, the result has the dtype of the scores");
  set_masks(args, padding, mask, Place(scores));
  args.scores = args.out = written_to(scores);
  launch(args, scores);
}

// The gradient of the scores, and where flags say so, summed over the keys, what the head mask's gradient is made of:
// (batch, nheads, q_len), float32; else no elements.
template <LaunchSoftmax launch>
std::tuple<Tensor, Tensor> softmax_backward(const Tensor& grad, const Tensor& probs, double scale,
                                            const OptionalTensor& head_mask, const OptionalTensor& rng,
                                            double dropout_p, int64_t flags) {
  bool same = grad.dim() == 4 && probs.dim() == 4 && grad.scalar_type() == probs.scalar_type() && Place(grad) == Place(probs);
  for (int64_t d = 0; same && d < 4; ++d) same = grad.size(d) == probs.size(d);
  require(same, "causal_softmax_backward: grad and probs must share shape, dtype and device");
  const Tensor g = with_contiguous_last_dim(grad), p = with_contiguous_last_dim(probs);
  SoftmaxArgs args = make_softmax_args(p, scale, head_mask, rng, dropout_p, flags);
  args.grad = read_from(g);
  args.probs = read_from(p);
  const auto sizes = p.sizes();
  const Place place(p);
  const int64_t none = 0;
  Tensor out = empty_contiguous(sizes.data(), 4, result_type(flags, p.scalar_type()), place);
  Tensor dots = flags & kRowDots ? empty_contiguous(sizes.data(), 3, ScalarType::Float, place)
                                 : empty_contiguous(&none, 1, ScalarType::Float, place);
  args.out = written_to(out);
  if (flags & kRowDots) {
    args.row_dots = static_cast<float*>(dots.mutable_data_ptr());
    if (p.size(3) == 0) torch::stable::zero_(dots);  // sums over no keys, for which nothing may be launched
  }
  launch(args, p);
  return {out, dots};
}

template <LaunchSoftmax forward, LaunchSoftmax backward>
void register_softmax(torch::stable::detail::StableLibrary& m) {
  m.impl("causal_softmax", TORCH_BOX(&softmax<forward>));
  m.impl("causal_softmax.inference", TORCH_BOX(&softmax_inference<forward>));
  m.impl("causal_softmax_", TORCH_BOX(&softmax_inplace<forward>));
  m.impl("causal_softmax_backward", TORCH_BOX(&softmax_backward<backward>));
  m.impl("causal_softmax_backward.inference", TORCH_BOX(&softmax_backward<backward>));
}

}  // namespace neox
