#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "tokens/arguments.h"
#include "tokens/cuda/assignment.h"
#include "tokens/cuda/gather_rows.cuh"
#include "tokens/cuda/segment_sum.cuh"
#include "tokens/cuda/weight_gradient.cuh"

namespace torchops {
namespace {

std::tuple<at::Tensor, at::Tensor> merge_tokens_cuda(const at::Tensor& input, const at::Tensor& assign,
                                                     int64_t num_groups, const std::optional<at::Tensor>& weight,
                                                     bool normalize) {
  check_merge_tokens(input, assign, num_groups, weight);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto channels = input.size(2);
  const auto accumulation_dtype = at::toOpMathType(input.scalar_type());
  const auto groups = group_members_cuda(assign, num_groups);
  const auto x = with_contiguous_rows(input);
  const auto w = side_input(weight, accumulation_dtype);
  auto merged = at::empty({input.size(0), num_groups, channels}, input.options());
  auto total = at::empty({input.size(0), num_groups}, input.options().dtype(accumulation_dtype));

  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto args = segment_sum_arguments<T>(x, w, groups.offsets, groups.members, merged, total, normalize);
    for_row_width<T>(channels, {x, merged}, [&](auto width) {
      device::launch({total.numel(), threads_for_row(channels, width)},
                     kernels::tokens::segment_sum<decltype(width)::value, T>, args);
    });
  });
  return {merged, total};
}

std::tuple<at::Tensor, at::Tensor> merge_tokens_backward_cuda(
    const std::optional<at::Tensor>& grad_merged, const std::optional<at::Tensor>& grad_total,
    const std::optional<at::Tensor>& input, const at::Tensor& assign, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& total, bool normalize, std::array<bool, 2> output_mask) {
  check_merge_tokens_backward(grad_merged, grad_total, input, assign, weight, total, normalize, output_mask);
  const at::Tensor& known = grad_merged ? *grad_merged : *grad_total;
  const c10::cuda::CUDAGuard guard(known.device());
  const auto num_groups = known.size(1);
  const auto grad = grad_merged ? with_contiguous_rows(*grad_merged) : at::Tensor();
  const auto accumulation_dtype = at::toOpMathType(known.scalar_type());
  const auto w = side_input(weight, accumulation_dtype);
  const auto totals = normalize && total ? total->contiguous() : at::Tensor();

  at::Tensor grad_input, grad_weight;
  for_dtype(known.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (output_mask[0] && grad_merged) {
      const auto channels = grad.size(2);
      const auto groups = assign.contiguous();
      grad_input = at::empty({assign.size(0), assign.size(1), channels}, grad.options());
      const auto args = gather_rows_arguments<T>(grad, groups, w, totals, {}, grad_input);
      for_row_width<T>(channels, {grad, grad_input}, [&](auto width) {
        device::launch({groups.numel(), threads_for_row(channels, width)},
                       kernels::tokens::gather_rows<decltype(width)::value, T>, args);
      });
    }
    if (output_mask[1]) {
      grad_weight = at::zeros(assign.sizes(), known.options().dtype(accumulation_dtype));
      const auto [offsets, members] = group_members_cuda(assign, num_groups);
      const auto x = grad_merged ? with_contiguous_rows(*input) : at::Tensor();
      const auto grad_of_total = side_input(grad_total, accumulation_dtype);
      const auto args = weight_gradient_arguments<T>(x, grad, grad_of_total, w, totals, offsets, members, grad_weight);
      device::launch({known.size(0) * num_groups, kernels::tokens::weight_gradient_threads},
                     kernels::tokens::weight_gradient<T>, args);
    }
  });
  return {grad_input, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("merge_tokens", merge_tokens_cuda);
  m.impl("_merge_tokens_backward", merge_tokens_backward_cuda);
}

}  // namespace torchops
