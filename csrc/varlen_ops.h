// The varlen ops on torch tensors, written once for CPU and CUDA: they check the call, describe it, allocate, and hand over
// to the launches. The checks are complete but for values, which the CPU's launches read.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"
#include "varlen_args.h"

namespace neox {

// `strict`: no index may be -1.
using LaunchGather = void (*)(const GatherArgs&, bool strict, const Tensor& like);
using LaunchMetadata = void (*)(const MaskArgs&, const Tensor& like);

// Describes x, of which the first `lead` (1 or 2) dimensions count rows; false where its rows are neither one piece of
// memory nor evenly spaced ones.
inline bool describe_rows(const Tensor& x, int64_t lead, int64_t element_size, RowTensor& row) {
  row.in = static_cast<const char*>(x.const_data_ptr());
  row.seqlen = x.size(lead - 1);
  row.stride_seqlen = x.stride(lead - 1) * element_size;
  row.stride_batch = lead == 2 ? x.stride(0) * element_size : 0;
  if (lead == 2 && (x.size(0) == 1 || row.stride_batch == row.seqlen * row.stride_seqlen)) row.seqlen *= x.size(0);
  row.blocks = 1;
  row.stride_block = 0;
  row.block_bytes = element_size;
  for (int64_t d = x.dim() - 1; d >= lead; --d) {
    const int64_t size = x.size(d), stride = x.stride(d) * element_size;
    if (size == 1) continue;
    if (row.blocks == 1 && stride == row.block_bytes) {
      row.block_bytes *= size;
    } else if (row.blocks == 1 && row.block_bytes > element_size) {
      row.blocks = size;
      row.stride_block = stride;
    } else if (row.blocks > 1 && stride == row.blocks * row.stride_block) {
      row.blocks *= size;
    } else {
      return false;  // among them those whose last dimension is not contiguous: element by element is slower than a copy
    }
  }
  return true;
}

template <LaunchGather launch>
std::vector<Tensor> gather_rows(std::vector<Tensor> tensors, const Tensor& indices, const OptionalTensor& inverse) {
  std::vector<Tensor> results;
  if (tensors.empty()) return results;
  const Tensor places = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const Place place(places);
  const int64_t lead = inverse.has_value() ? inverse->dim() : 1, out_dims = places.dim();
  require(inverse.has_value() ? lead >= 1 && out_dims >= 1 && lead + out_dims == 3 : out_dims == 1,
          "varlen: indices must be (total,), and inverse (batch, seqlen)");
  GatherArgs args{};
  args.indices = indices_of(places, place, "varlen: indices must be int32 or int64");
  args.rows_out = places.numel();
  for (const Tensor& x : tensors) {
    require(x.dim() >= lead && Place(x) == place, "varlen: tensors must have their rows' dimensions, on one device");
    for (int64_t d = 0; d < lead; ++d) {
      require(x.size(d) == (inverse.has_value() ? inverse->size(d) : tensors[0].size(d)),
              "varlen: the first dimensions of tensors must be those of the metadata");
    }
  }
  args.rows_in = tensors[0].size(0) * (lead == 2 ? tensors[0].size(1) : 1);

  results.reserve(tensors.size());
  for (size_t first = 0; first < tensors.size(); first += kMaxTensors) {
    args.ntensors = 0;
    for (size_t i = first; i < std::min<size_t>(first + kMaxTensors, tensors.size()); ++i) {
      Tensor& x = tensors[i];
      const int64_t trailing = x.dim() - lead;
      require(out_dims + trailing <= kMaxDims, "varlen: a result must have at most 64 dimensions");
      int64_t sizes[kMaxDims];
      bool empty = false;
      for (int64_t d = 0; d < out_dims; ++d) sizes[d] = places.size(d);
      for (int64_t d = 0; d < trailing; ++d) empty = (sizes[out_dims + d] = x.size(lead + d)) == 0 || empty;
      const ScalarType type = x.scalar_type();
      results.push_back(empty_contiguous(sizes, out_dims + trailing, type, place));
      if (empty) continue;
      const auto element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(type)));
      RowTensor& row = args.tensors[args.ntensors++];
      if (!describe_rows(x, lead, element_size, row)) {
        x = torch::stable::contiguous(x);
        describe_rows(x, lead, element_size, row);
      }
      row.out = static_cast<char*>(results.back().mutable_data_ptr());
    }
    launch(args, !inverse.has_value(), places);
  }
  return results;
}

inline void describe_mask(const Tensor& mask, MaskArgs& args) {
  require(mask.dim() == 2, "varlen: attention_mask must be (batch, seqlen)");
  require(mask.numel() < int64_t{1} << 31, "varlen: attention_mask must have fewer than 2**31 tokens");
  const ScalarType type = mask.scalar_type();
  args.one = 1;
  switch (type) {
    case ScalarType::Half: args.one = 0x3c00, args.minus_zero = 0x8000; break;
    case ScalarType::BFloat16: args.one = 0x3f80, args.minus_zero = 0x8000; break;
    case ScalarType::Float: args.one = 0x3f800000, args.minus_zero = uint64_t{1} << 31; break;
    case ScalarType::Double: args.one = uint64_t{0x3ff} << 52, args.minus_zero = uint64_t{1} << 63; break;
    case ScalarType::Bool: case ScalarType::Byte: case ScalarType::Char: case ScalarType::Short: case ScalarType::Int:
    case ScalarType::Long: case ScalarType::UInt16: case ScalarType::UInt32: case ScalarType::UInt64: break;
    default: require(false, "varlen: attention_mask must be bool, of an integer dtype or of a floating one");
  }
  args.mask = mask.const_data_ptr();
  args.batch = mask.size(0);
  args.seqlen = mask.size(1);
  args.stride_batch = mask.stride(0);
  args.stride_seqlen = mask.stride(1);
  args.element_size = static_cast<int32_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(type)));
}

template <LaunchMetadata launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_metadata(const Tensor& attention_mask, int64_t capacity,
                                                           int64_t max_seqlen) {
  MaskArgs args{};
  describe_mask(attention_mask, args);
  require(capacity >= 0 && max_seqlen >= 0, "varlen: capacity and max_seqlen must not be negative");
  args.capacity = capacity;
  args.max_seqlen = max_seqlen;
  const Place place(attention_mask);
  const int64_t room[] = {capacity}, ends[] = {args.batch + 1}, tokens[] = {args.batch, args.seqlen}, facts[] = {3};
  std::tuple<Tensor, Tensor, Tensor, Tensor> made{
      empty_contiguous(room, 1, ScalarType::Long, place), empty_contiguous(ends, 1, ScalarType::Int, place),
      empty_contiguous(tokens, 2, ScalarType::Int, place), empty_contiguous(facts, 1, ScalarType::Long, place)};
  args.indices = static_cast<int64_t*>(std::get<0>(made).mutable_data_ptr());
  args.cu_seqlens = static_cast<int32_t*>(std::get<1>(made).mutable_data_ptr());
  args.inverse = static_cast<int32_t*>(std::get<2>(made).mutable_data_ptr());
  args.facts = static_cast<int64_t*>(std::get<3>(made).mutable_data_ptr());
  launch(args, attention_mask);
  return made;
}

template <LaunchGather launch, LaunchMetadata launch_metadata>
void register_varlen(torch::stable::detail::StableLibrary& m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows<launch>));
  m.impl("gather_rows.inference", TORCH_BOX(&gather_rows<launch>));
  m.impl("varlen_metadata", TORCH_BOX(&varlen_metadata<launch_metadata>));
}

}  // namespace neox
