#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "core/tensors.h"
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
  const auto batch = input.size(0), num_tokens = input.size(1), channels = input.size(2);
  const auto accumulation_dtype = at::toOpMathType(input.scalar_type());
  const auto groups = group_members_cuda(assign, num_groups);
  const auto x = with_contiguous_rows(input);
  const auto w = weight ? weight->to(accumulation_dtype).contiguous() : at::Tensor();
  auto merged = at::empty({batch, num_groups, channels}, input.options());
  auto total = at::empty({batch, num_groups}, input.options().dtype(accumulation_dtype));

  for_dtype(input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const kernels::tokens::SegmentSum<T> args{rows<T>(x),
                                              w.defined() ? w.template const_data_ptr<A>() : nullptr,
                                              groups.offsets.template const_data_ptr<int64_t>(),
                                              groups.members.template const_data_ptr<int64_t>(),
                                              static_cast<T*>(merged.mutable_data_ptr()),
                                              total.template mutable_data_ptr<A>(),
                                              num_tokens,
                                              num_groups,
                                              channels,
                                              normalize};
    for_row_width<T>(channels, {x, merged}, [&](auto width) {
      device::launch({batch * num_groups, threads_for_row(channels, width)},
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
  const auto batch = grad_merged.size(0), num_groups = grad_merged.size(1), channels = grad_merged.size(2);
  const auto num_tokens = assign.size(1);
  const auto groups = assign.contiguous();
  const auto grad = with_contiguous_rows(grad_merged);
  const auto totals = total.contiguous();
  const auto w = weight ? weight->to(total.scalar_type()).contiguous() : at::Tensor();

  at::Tensor grad_input, grad_weight;
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    if (output_mask[0]) {
      grad_input = at::empty({batch, num_tokens, channels}, grad.options());
      const kernels::tokens::GatherRows<T> args{rows<T>(grad),
                                                groups.template const_data_ptr<int64_t>(),
                                                w.defined() ? w.template const_data_ptr<A>() : nullptr,
                                                normalize ? totals.template const_data_ptr<A>() : nullptr,
                                                {},
                                                static_cast<T*>(grad_input.mutable_data_ptr()),
                                                num_tokens,
                                                num_groups,
                                                channels};
      for_row_width<T>(channels, {grad, grad_input}, [&](auto width) {
        device::launch({batch * num_tokens, threads_for_row(channels, width)},
                       kernels::tokens::gather_rows<decltype(width)::value, T>, args);
      });
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
      constexpr int64_t warps = 4;
      device::launch({(batch * num_tokens + warps - 1) / warps, warps * device::warp_size},
                     kernels::tokens::weight_gradient<T>, args, batch * num_tokens);
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
