#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

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
    const std::optional<at::Tensor>& grad_merged, const std::optional<at::Tensor>& grad_total,
    const std::optional<at::Tensor>& input, const at::Tensor& assign, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& total, bool normalize, std::array<bool, 2> output_mask) {
  check_merge_tokens_backward(grad_merged, grad_total, input, assign, weight, total, normalize, output_mask);
  const at::Tensor& known = grad_merged ? *grad_merged : *grad_total;
  const auto num_groups = known.size(1);
  const auto groups = checked_assignment("_merge_tokens_backward", assign, num_groups);
  const auto grad = grad_merged ? with_contiguous_rows(*grad_merged) : at::Tensor();
  const auto accumulation_dtype = at::toOpMathType(known.scalar_type());
  const auto w = side_input(weight, accumulation_dtype);
  const auto totals = normalize && total ? total->contiguous() : at::Tensor();

  at::Tensor grad_input, grad_weight;
  for_dtype(known.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (output_mask[0] && grad_merged) {
      const auto channels = grad.size(2);
      grad_input = at::empty({assign.size(0), assign.size(1), channels}, grad.options());
      const auto args = gather_rows_arguments<T>(grad, groups, w, totals, {}, grad_input);
      parallel_units(groups.numel(), channels,
                     [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, gather_rows<T>)(args, begin, end); });
    }
    if (output_mask[1]) {
      grad_weight = at::zeros(assign.sizes(), known.options().dtype(accumulation_dtype));
      const auto [offsets, members] = group_members(groups, num_groups);
      const auto x = grad_merged ? with_contiguous_rows(*input) : at::Tensor();
      const auto grad_of_total = side_input(grad_total, accumulation_dtype);
      const auto args = weight_gradient_arguments<T>(x, grad, grad_of_total, w, totals, offsets, members, grad_weight);
      const int64_t cost = args.num_channels * (1 + args.num_tokens / std::max<int64_t>(1, num_groups));
      parallel_units(known.size(0) * num_groups, cost, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(tokens, weight_gradient<T>)(args, begin, end);
      });
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
