#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/parallel.h"
#include "core/tensors.h"
#include "tokens/cpu/assignment.h"
#include "tokens/cpu/gather_rows_kernel.h"
#include "tokens/cpu/segment_sum_kernel.h"
#include "tokens/cpu/weight_gradient_kernel.h"

namespace torchops {
namespace {

// [B, N] in the accumulation dtype of `dtype`, or null.
template <typename A>
const A* accumulation_data(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<A>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor> merge_tokens_cpu(const at::Tensor& input, const at::Tensor& assign,
                                                    int64_t num_groups, const std::optional<at::Tensor>& weight,
                                                    bool normalize) {
  check_merge_tokens(input, assign, num_groups, weight);
  const auto batch = input.size(0), num_tokens = input.size(1), channels = input.size(2);
  const auto accumulation_dtype = at::toOpMathType(input.scalar_type());
  const auto groups = group_members(checked_assignment("merge_tokens", assign, num_groups), num_groups);
  const auto x = with_contiguous_rows(input);
  std::optional<at::Tensor> w;
  if (weight) {
    w = weight->to(accumulation_dtype).contiguous();
  }
  auto merged = at::empty({batch, num_groups, channels}, input.options());
  auto total = at::empty({batch, num_groups}, input.options().dtype(accumulation_dtype));

  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const kernels::tokens::SegmentSum<T> args{rows<T>(x),
                                              accumulation_data<A>(w),
                                              groups.offsets.const_data_ptr<int64_t>(),
                                              groups.members.const_data_ptr<int64_t>(),
                                              static_cast<T*>(merged.mutable_data_ptr()),
                                              total.mutable_data_ptr<A>(),
                                              num_tokens,
                                              num_groups,
                                              channels,
                                              normalize};
    parallel_units(batch * num_groups, channels,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, segment_sum<T>)(args, begin, end); });
  });
  return {merged, total};
}

std::tuple<at::Tensor, at::Tensor> merge_tokens_backward_cpu(
    const at::Tensor& grad_merged, const at::Tensor& grad_total, const std::optional<at::Tensor>& input,
    const at::Tensor& assign, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& merged,
    const at::Tensor& total, bool normalize, std::array<bool, 2> output_mask) {
  check_merge_tokens_backward(grad_merged, grad_total, input, assign, weight, merged, total, output_mask);
  const auto batch = grad_merged.size(0), num_groups = grad_merged.size(1), channels = grad_merged.size(2);
  const auto num_tokens = assign.size(1);
  const auto groups = checked_assignment("_merge_tokens_backward", assign, num_groups);
  const auto grad = with_contiguous_rows(grad_merged);
  const auto totals = total.contiguous();
  std::optional<at::Tensor> w;
  if (weight) {
    w = weight->to(total.scalar_type()).contiguous();
  }

  at::Tensor grad_input, grad_weight;
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    if (output_mask[0]) {
      grad_input = at::empty({batch, num_tokens, channels}, grad.options());
      const kernels::tokens::GatherRows<T> args{rows<T>(grad),
                                                groups.template const_data_ptr<int64_t>(),
                                                accumulation_data<A>(w),
                                                normalize ? totals.template const_data_ptr<A>() : nullptr,
                                                {},
                                                static_cast<T*>(grad_input.mutable_data_ptr()),
                                                num_tokens,
                                                num_groups,
                                                channels};
      parallel_units(batch * num_tokens, channels,
                     [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, gather_rows<T>)(args, begin, end); });
    }
    if (output_mask[1]) {
      auto wide = at::empty({batch, num_tokens}, totals.options());
      const auto x = with_contiguous_rows(*input), y = with_contiguous_rows(*merged);
      const auto grad_of_total = grad_total.contiguous();
      const kernels::tokens::WeightGradient<T> args{rows<T>(x),
                                                    rows<T>(y),
                                                    rows<T>(grad),
                                                    grad_of_total.template const_data_ptr<A>(),
                                                    totals.template const_data_ptr<A>(),
                                                    groups.template const_data_ptr<int64_t>(),
                                                    wide.template mutable_data_ptr<A>(),
                                                    num_tokens,
                                                    num_groups,
                                                    channels,
                                                    normalize};
      parallel_units(batch * num_tokens, channels, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(tokens, weight_gradient<T>)(args, begin, end);
      });
      grad_weight = wide.to(weight->scalar_type());
    }
  });
  return {grad_input, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CPU, m) {
  m.impl("merge_tokens", merge_tokens_cpu);
  m.impl("_merge_tokens_backward", merge_tokens_backward_cpu);
}

}  // namespace torchops
