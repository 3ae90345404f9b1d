#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
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
    const at::Tensor& grad_merged, const at::Tensor& grad_total, const std::optional<at::Tensor>& input,
    const at::Tensor& assign, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& merged,
    const at::Tensor& total, bool normalize, std::array<bool, 2> output_mask) {
  check_merge_tokens_backward(grad_merged, grad_total, input, assign, weight, merged, total, output_mask);
  const c10::cuda::CUDAGuard guard(grad_merged.device());
  const auto groups = assign.contiguous();
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
      for_row_width<T>(channels, {grad, grad_input}, [&](auto width) {
        device::launch({groups.numel(), threads_for_row(channels, width)},
                       kernels::tokens::gather_rows<decltype(width)::value, T>, args);
      });
    }
    if (output_mask[1]) {
      auto wide = at::empty(assign.sizes(), totals.options());
      const auto x = with_contiguous_rows(*input), y = with_contiguous_rows(*merged);
      const auto grad_of_total = grad_total.contiguous();
      const auto args = weight_gradient_arguments<T>(x, y, grad, grad_of_total, totals, groups, wide, normalize);
      constexpr int64_t warps = 4;
      device::launch({(groups.numel() + warps - 1) / warps, warps * device::warp_size},
                     kernels::tokens::weight_gradient<T>, args, groups.numel());
      grad_weight = wide.to(weight->scalar_type());
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
