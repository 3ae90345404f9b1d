#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/tensors.h"
#include "tokens/gather_rows.h"
#include "tokens/segment_sum.h"
#include "tokens/weight_gradient.h"

// From checked tensors to what the kernels of every device take. Tensors have contiguous rows, side inputs
// are contiguous and of the accumulation dtype, and an absent one is undefined.

namespace torchops {

template <typename T>
kernels::tokens::SegmentSum<T> segment_sum_arguments(const at::Tensor& input,    // [B, N, C]
                                                     const at::Tensor& weight,   // [B, N]
                                                     const at::Tensor& offsets,  // [B, M + 1]
                                                     const at::Tensor& members,  // [B, N]
                                                     const at::Tensor& output,   // [B, M, C]
                                                     const at::Tensor& total,    // [B, M]
                                                     bool normalize) {
  using A = kernels::accumulate_t<T>;
  return {rows<T>(input),
          data_or_null<A>(weight),
          offsets.const_data_ptr<int64_t>(),
          members.const_data_ptr<int64_t>(),
          static_cast<T*>(output.mutable_data_ptr()),
          mutable_data_or_null<A>(total),
          input.size(1),
          output.size(1),
          input.size(2),
          normalize};
}

template <typename T>
kernels::tokens::GatherRows<T> gather_rows_arguments(const at::Tensor& source,    // [B, M, C]
                                                     const at::Tensor& assign,    // [B, N]
                                                     const at::Tensor& weight,    // [B, N]
                                                     const at::Tensor& total,     // [B, M]
                                                     const at::Tensor& residual,  // [B, N, C]
                                                     const at::Tensor& output) {  // [B, N, C]
  using A = kernels::accumulate_t<T>;
  return {rows<T>(source),
          assign.const_data_ptr<int64_t>(),
          data_or_null<A>(weight),
          data_or_null<A>(total),
          residual.defined() ? rows<T>(residual) : kernels::Rows<const T>{},
          static_cast<T*>(output.mutable_data_ptr()),
          assign.size(1),
          source.size(1),
          source.size(2)};
}

template <typename T>
kernels::tokens::WeightGradient<T> weight_gradient_arguments(const at::Tensor& input,          // [B, N, C]
                                                             const at::Tensor& grad_merged,    // [B, M, C]
                                                             const at::Tensor& grad_total,     // [B, M]
                                                             const at::Tensor& weight,         // [B, N]
                                                             const at::Tensor& total,          // [B, M]
                                                             const at::Tensor& offsets,        // [B, M + 1]
                                                             const at::Tensor& members,        // [B, N]
                                                             const at::Tensor& grad_weight) {  // [B, N]
  using A = kernels::accumulate_t<T>;
  const bool of_rows = grad_merged.defined();
  return {of_rows ? rows<T>(input) : kernels::Rows<const T>{},
          of_rows ? rows<T>(grad_merged) : kernels::Rows<const T>{},
          data_or_null<A>(grad_total),
          data_or_null<A>(weight),
          of_rows ? data_or_null<A>(total) : nullptr,
          offsets.const_data_ptr<int64_t>(),
          members.const_data_ptr<int64_t>(),
          grad_weight.mutable_data_ptr<A>(),
          members.size(1),
          offsets.size(1) - 1,
          of_rows ? grad_merged.size(2) : 0};
}

// A side input as kernels take it: contiguous, of the accumulation dtype; undefined where absent.
inline at::Tensor side_input(const std::optional<at::Tensor>& tensor, at::ScalarType accumulation_dtype) {
  return tensor ? tensor->to(accumulation_dtype).contiguous() : at::Tensor();
}

}  // namespace torchops
