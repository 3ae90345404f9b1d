#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/parallel.h"
#include "tokens/arguments.h"
#include "tokens/cpu/assignment.h"
#include "tokens/cpu/gather_rows_kernel.h"
#include "tokens/cpu/segment_sum_kernel.h"
#include "tokens/cpu/weight_gradient_kernel.h"

namespace torchops {
namespace {

std::tuple<at::Tensor, at::Tensor> merge_tokens_cpu(const at::Tensor& input, const at::Tensor& assign,
                                                    int64_t num_groups, const std::optional<at::Tensor>& weight,
                                                    bool normalize) {
  check_merge_tokens(input, assign, num_groups, weight);
  const auto accumulation_dtype = at::toOpMathType(input.scalar_type());
  const auto groups = group_members(checked_assignment("merge_tokens", assign, num_groups), num_groups);
  const auto x = with_contiguous_rows(input);
  const auto w = side_input(weight, accumulation_dtype);
  auto merged = at::empty({input.size(0), num_groups, input.size(2)}, input.options());
  auto total = at::empty({input.size(0), num_groups}, input.options().dtype(accumulation_dtype));

  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto args = segment_sum_arguments<T>(x, w, groups.offsets, groups.members, merged, total, normalize);
    parallel_units(total.numel(), input.size(2),
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, segment_sum<T>)(args, begin, end); });
  });
  return {merged, total};
}

std::tuple<at::Tensor, at::Tensor> merge_tokens_backward_cpu(
    const at::Tensor& grad_merged, const at::Tensor& grad_total, const std::optional<at::Tensor>& input,
    const at::Tensor& assign, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& merged,
    const at::Tensor& total, bool normalize, std::array<bool, 2> output_mask) {
  check_merge_tokens_backward(grad_merged, grad_total, input, assign, weight, merged, total, output_mask);
  const auto groups = checked_assignment("_merge_tokens_backward", assign, grad_merged.size(1));
  const auto grad = with_contiguous_rows(grad_merged);
  const auto totals = total.contiguous();
  const auto channels = grad.size(2);

  at::Tensor grad_input, grad_weight;
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (output_mask[0]) {
      grad_input = at::empty({assign.size(0), assign.size(1), channels}, grad.options());
      const auto w = side_input(weight, total.scalar_type());
      const auto args = gather_rows_arguments<T>(grad, groups, w, normalize ? totals : at::Tensor(), {}, grad_input);
      parallel_units(groups.numel(), channels,
                     [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, gather_rows<T>)(args, begin, end); });
    }
    if (output_mask[1]) {
      auto wide = at::empty(assign.sizes(), totals.options());
      const auto x = with_contiguous_rows(*input), y = with_contiguous_rows(*merged);
      const auto grad_of_total = grad_total.contiguous();
      const auto args = weight_gradient_arguments<T>(x, y, grad, grad_of_total, totals, groups, wide, normalize);
      parallel_units(groups.numel(), channels, [&](int64_t begin, int64_t end) {
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
