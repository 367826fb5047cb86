// Causal softmax on the CPU, row by row. A row's visible part is read twice, from memory and then from the cache: for its
// maximum and for its exponentials, which wait in float32 for their sum and are then written once; a short row is read once
// and waits in registers. What is not visible is only written, as zero.
#include "cpu/softmax_masks.h"
#include "cpu/softmax_passes.h"
#include "cpu/softmax_short.h"

namespace neox {

// The keys of one sequence that its padding mask leaves: none before `begin` or from `end` on, and those between are all
// visible if `keep` is nullptr.
struct KeyRange {
  int64_t begin, end;
  const bool* keep;
};

// The rows begin <= row < end, counted over batch, heads and queries; `scratch` holds k_len floats.
NEOX_DECLARE_PER_ISA(void softmax_rows(const SoftmaxArgs& args, const KeyRange* ranges, int64_t begin, int64_t end,
                                       float* scratch))
NEOX_DECLARE_PER_ISA(void softmax_backward_rows(const SoftmaxArgs& args, int64_t begin, int64_t end, float* scratch))

namespace NEOX_CPU_ISA {
namespace {

// Where a row lies; the next one is found by counting, since three divisions cost as much as a short row.
struct Row {
  int64_t index, b, h, q;
  Row(const SoftmaxArgs& args, int64_t row)
      : index(row), b(row / (args.nheads * args.q_len)), h(row / args.q_len % args.nheads), q(row % args.q_len) {}
  void advance(const SoftmaxArgs& args) {
    ++index;
    if (++q < args.q_len) return;
    q = 0;
    if (++h < args.nheads) return;
    h = 0;
    ++b;
  }
};

template <class T>
T* at(const Scores& x, const Row& row) {
  return static_cast<T*>(x.data) + row.b * x.stride_batch + row.h * x.stride_head + row.q * x.stride_q;
}

// Whether a product is NaN, which a maximum may not show.
template <class T>
bool has_nan(const T* x, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    float value;
    store(&value, mul(load(x + i, 1), broadcast(scale)), 1);
    if (value != value) return true;
  }
  return false;
}

// The exponentials of the visible scores into e, and their sum: 0 for a row without a visible key.
template <class T>
double exponentiate(const SoftmaxArgs& args, const Row& row, const KeyRange& range, const T* x, float* e, int64_t n) {
  const AttnMask& mask = args.attn_mask;
  if (mask.kind == MaskKind::kNone && range.keep == nullptr) {
    float most = largest(x, n, args.scale);
    if (most == -kInfinity) {
      if (!has_nan(x, n, args.scale)) return 0;
      most = 0;
    }
    return exponentials(x, e, n, args.scale, most);
  }
  store_each(x, e, n, Times(args.scale));
  if (mask.kind != MaskKind::kNone) {
    const int64_t first = row.b * mask.stride_batch + row.h * mask.stride_head + row.q * mask.stride_q;
    apply_attn_mask(mask, first + range.begin * mask.stride_k, e, n);
  }
  if (range.keep != nullptr) hide(range.keep + range.begin, 1, e, n);
  float most = largest(e, n, 1.0f);
  if (most == -kInfinity) {
    if (!has_nan(e, n, 1.0f)) return 0;
    most = 0;
  }
  return exponentials(e, e, n, 1.0f, most);
}

template <class T, class Out>
void softmax_row(const SoftmaxArgs& args, const Row& row, const KeyRange* ranges, float* e) {
  const KeyRange& range = ranges[row.b];
  Out* out = at<Out>(args.out, row);
  Out* probs = args.probs.data != nullptr ? at<Out>(args.probs, row) : nullptr;
  const int64_t visible = visible_keys(args, row.q);
  int64_t begin = range.begin, end = visible < range.end ? visible : range.end, n = end - begin;
  const T* scores = at<const T>(args.scores, row) + begin;
  const float of_head = head_factor(args, row.b, row.h);
  const bool plain = args.attn_mask.kind == MaskKind::kNone && range.keep == nullptr && args.rng == nullptr && probs == nullptr;
  if (plain && by_vectors(n, [&](auto count) {
        return softmax_vectors<count.kCount>(scores, out + begin, n, args.scale, of_head);
      })) {
    fill_zero(out, begin);
    fill_zero(out + end, args.k_len - end);
    return;
  }
  const double total = n > 0 ? exponentiate(args, row, range, scores, e, n) : 0.0;
  if (total != total) {  // NaN up to the diagonal, padding included
    begin = 0, end = n = visible;
    for (int64_t i = 0; i < n; ++i) e[i] = static_cast<float>(total);
  }
  if (total == 0.0) {
    fill_zero(out, args.k_len);
    if (probs != nullptr) fill_zero(probs, args.k_len);
    return;
  }
  double inverse = 1.0 / total;
  const auto write = [&](Out* to, double factor) {
    store_each(e, to + begin, n, Normalise<Out>(factor));
    fill_zero(to, begin);
    fill_zero(to + end, args.k_len - end);
  };
  if (probs != nullptr) write(probs, inverse);
  if (args.rng != nullptr) {
    store_each(e, e, n, Normalise<float>(inverse));  // first, so that what is dropped of a row of NaN is zero too
    drop(args, row.index, begin, e, n);
    inverse = args.keep_scale;
  }
  write(out, inverse * of_head);
}

template <class T>
bool is_zero(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float value;
    store(&value, load(x + i, 1), 1);
    if (value != 0) return false;
  }
  return true;
}

// The gradient of the scores: scale * p * (g - sum(g p)), where g is the gradient of p: that of the output by head mask and
// dropout.
template <class P, class Out>
void backward_row(const SoftmaxArgs& args, const Row& row, float* dropped) {
  const int64_t n = visible_keys(args, row.q);
  const P *g = at<const P>(args.grad, row), *p = at<const P>(args.probs, row);
  Out* out = at<Out>(args.out, row);
  const float factor = args.scale * head_factor(args, row.b, row.h);
  float dot;
  const auto in_registers = [&](auto count) {
    dot = gradient_vectors<count.kCount>(g, p, out, n, factor);
    return true;
  };
  if (args.rng != nullptr) {
    store_each(g, dropped, n, Times(args.keep_scale));
    drop(args, row.index, 0, dropped, n);
    dot = dot_product(dropped, p, n);
    store_gradient(dropped, p, out, n, dot, factor);
  } else if (!by_vectors(n, in_registers)) {
    dot = dot_product(g, p, n);
    store_gradient(g, p, out, n, dot, factor);
  }
  if (dot != dot && is_zero(p, n)) {  // no visible key, whatever the gradient is
    dot = 0;
    fill_zero(out, n);
  }
  fill_zero(out + n, args.k_len - n);
  if (args.row_dots != nullptr) args.row_dots[row.index] = dot;
}

// Calls function with a value of the type.
template <class Function>
void dispatch(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat32: return function(float{});
    case Dtype::kBFloat16: return function(bf16{});
    case Dtype::kFloat16: return function(fp16{});
  }
}

}  // namespace

void softmax_rows(const SoftmaxArgs& args, const KeyRange* ranges, int64_t begin, int64_t end, float* scratch) {
  dispatch(args.scores.dtype, [&](auto in) {
    dispatch(args.out.dtype, [&](auto out) {
      for (Row row(args, begin); row.index < end; row.advance(args)) {
        softmax_row<decltype(in), decltype(out)>(args, row, ranges, scratch);
      }
    });
  });
}

void softmax_backward_rows(const SoftmaxArgs& args, int64_t begin, int64_t end, float* scratch) {
  dispatch(args.probs.dtype, [&](auto in) {
    dispatch(args.out.dtype, [&](auto out) {
      for (Row row(args, begin); row.index < end; row.advance(args)) {
        backward_row<decltype(in), decltype(out)>(args, row, scratch);
      }
    });
  });
}

}  // namespace NEOX_CPU_ISA
}  // namespace neox

#if defined(NEOX_CPU_DEFAULT)
#include <algorithm>
#include <memory>
#include <vector>

#include "softmax_ops.h"

namespace neox {
namespace {

// The mask row by row without strides, and what each row leaves.
std::vector<KeyRange> key_ranges(const SoftmaxArgs& args, std::unique_ptr<bool[]>& rows) {
  std::vector<KeyRange> ranges(static_cast<size_t>(args.batch), KeyRange{0, args.k_len, nullptr});
  if (args.key_padding == nullptr) return ranges;
  rows = std::make_unique<bool[]>(static_cast<size_t>(args.batch * args.k_len));
  for (int64_t b = 0; b < args.batch; ++b) {
    bool* keep = rows.get() + b * args.k_len;
    const bool* from = args.key_padding + b * args.key_padding_stride_batch;
    for (int64_t k = 0; k < args.k_len; ++k) keep[k] = from[k * args.key_padding_stride_k];
    KeyRange& range = ranges[static_cast<size_t>(b)];
    const bool* first = std::find(keep, keep + args.k_len, true);
    const bool* last = keep + args.k_len;
    while (last > first && !last[-1]) --last;
    range = {first - keep, last - keep, std::find(first, last, false) == last ? nullptr : keep};
  }
  return ranges;
}

// Rows in parallel. A thread is worth waking for about 16k elements (some 10 us of work).
template <class Work>
void for_rows(const SoftmaxArgs& args, const Work& work) {
  const int64_t rows = args.batch * args.nheads * args.q_len;
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.k_len));
  const auto run = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(args.k_len)]);  // not zeroed
    work(begin, end, scratch.get());
  };
  if (rows <= grain) {
    run(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, run);
  }
}

void forward(const SoftmaxArgs& args, const Tensor&) {
  std::unique_ptr<bool[]> rows;
  const std::vector<KeyRange> ranges = key_ranges(args, rows);
  const auto softmax_rows = NEOX_SELECT_ISA(softmax_rows);
  for_rows(args, [&](int64_t begin, int64_t end, float* scratch) { softmax_rows(args, ranges.data(), begin, end, scratch); });
}

void backward(const SoftmaxArgs& args, const Tensor&) {
  const auto softmax_rows = NEOX_SELECT_ISA(softmax_backward_rows);
  for_rows(args, [&](int64_t begin, int64_t end, float* scratch) { softmax_rows(args, begin, end, scratch); });
}

}  // namespace
}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CPU, m) { neox::register_softmax<neox::forward, neox::backward>(m); }
#endif
