#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>

#include "tokens/arguments.h"
#include "tokens/assignment.h"
#include "tokens/merge_tokens.h"
#include "tokens/unmerge_tokens.h"

// Moving data along an assignment, as every device does it. Device is made of an operator's name and of the device it
// runs on, and has
//   assignment(assign, num_groups) -> [B, N], contiguous: checked, where the device looks at data
//   members(assignment, num_groups) -> TokensOfGroups
//   segment_sum(args, num_groups of all rows)
//   gather_rows(args, num_tokens of all rows)
//   weight_gradient(args, num_groups of all rows)

namespace torchops {

template <typename Device>
std::tuple<at::Tensor, at::Tensor> merge_tokens_on(const at::Tensor& input, const at::Tensor& assign,
                                                   int64_t num_groups, const std::optional<at::Tensor>& weight,
                                                   bool normalize) {
  check_merge_tokens(input, assign, num_groups, weight);
  const Device device("merge_tokens", input.device());
  const auto accumulation_dtype = at::toOpMathType(input.scalar_type());
  const auto groups = device.members(device.assignment(assign, num_groups), num_groups);
  const auto x = with_contiguous_rows(input);
  const auto w = side_input(weight, accumulation_dtype);
  auto merged = at::empty({input.size(0), num_groups, input.size(2)}, input.options());
  auto total = at::empty({input.size(0), num_groups}, input.options().dtype(accumulation_dtype));
  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.segment_sum(segment_sum_arguments<T>(x, w, groups.offsets, groups.members, merged, total, normalize),
                       total.numel());
  });
  return {merged, total};
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> merge_tokens_backward_on(const MergeBackward& args) {
  check_merge_tokens_backward(args);
  const at::Tensor& known = args.given_grad();
  const Device device("_merge_tokens_backward", known.device());
  const auto batch = known.size(0), num_groups = known.size(1);
  const auto accumulation_dtype = at::toOpMathType(known.scalar_type());
  const auto assignment = device.assignment(args.assign, num_groups);
  const auto grad = args.grad_merged ? with_contiguous_rows(*args.grad_merged) : at::Tensor();
  const auto weight = side_input(args.weight, accumulation_dtype);
  const auto total = args.normalize && args.total ? args.total->contiguous() : at::Tensor();

  at::Tensor grad_input, grad_weight;
  for_dtype(known.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.output_mask[0] && args.grad_merged) {
      grad_input = at::empty({batch, assignment.size(1), grad.size(2)}, grad.options());
      device.gather_rows(gather_rows_arguments<T>(grad, assignment, weight, total, {}, grad_input), assignment.numel());
    }
    if (args.output_mask[1]) {
      grad_weight = at::zeros(assignment.sizes(), known.options().dtype(accumulation_dtype));
      const auto groups = device.members(assignment, num_groups);
      const auto x = args.grad_merged ? with_contiguous_rows(*args.input) : at::Tensor();
      const auto grad_total = side_input(args.grad_total, accumulation_dtype);
      device.weight_gradient(
          weight_gradient_arguments<T>(x, grad, grad_total, weight, total, groups.offsets, groups.members, grad_weight),
          batch * num_groups);
    }
  });
  return {grad_input, grad_weight};
}

template <typename Device>
at::Tensor unmerge_tokens_on(const at::Tensor& merged, const at::Tensor& assign,
                             const std::optional<at::Tensor>& residual) {
  check_unmerge_tokens(merged, assign, residual);
  const Device device("unmerge_tokens", merged.device());
  const auto assignment = device.assignment(assign, merged.size(1));
  const auto source = with_contiguous_rows(merged);
  const auto added = residual ? with_contiguous_rows(*residual) : at::Tensor();
  auto output = at::empty({assign.size(0), assign.size(1), merged.size(2)}, merged.options());
  for_dtype(merged.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.gather_rows(gather_rows_arguments<T>(source, assignment, {}, {}, added, output), assignment.numel());
  });
  return output;
}

template <typename Device>
at::Tensor unmerge_tokens_backward_on(const at::Tensor& grad, const at::Tensor& assign, int64_t num_groups) {
  check_unmerge_tokens_backward(grad, assign, num_groups);
  const Device device("_unmerge_tokens_backward", grad.device());
  const auto groups = device.members(device.assignment(assign, num_groups), num_groups);
  const auto rows = with_contiguous_rows(grad);
  auto grad_merged = at::empty({grad.size(0), num_groups, grad.size(2)}, grad.options());
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.segment_sum(segment_sum_arguments<T>(rows, {}, groups.offsets, groups.members, grad_merged, {},
                                                /*normalize=*/false),
                       grad.size(0) * num_groups);
  });
  return grad_merged;
}

}  // namespace torchops
