#include "tokens/unmerge_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "core/tensors.h"
#include "tokens/cuda/assignment.h"
#include "tokens/cuda/gather_rows.cuh"
#include "tokens/cuda/segment_sum.cuh"

namespace torchops {
namespace {

at::Tensor unmerge_tokens_cuda(const at::Tensor& merged, const at::Tensor& assign,
                               const std::optional<at::Tensor>& residual) {
  check_unmerge_tokens(merged, assign, residual);
  const c10::cuda::CUDAGuard guard(merged.device());
  const auto batch = merged.size(0), num_tokens = assign.size(1), channels = merged.size(2);
  const auto groups = assign.contiguous();
  const auto source = with_contiguous_rows(merged);
  const auto added = residual ? with_contiguous_rows(*residual) : at::Tensor();
  auto output = at::empty({batch, num_tokens, channels}, merged.options());

  for_dtype(merged.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::GatherRows<T> args{rows<T>(source),
                                              groups.template const_data_ptr<int64_t>(),
                                              nullptr,
                                              nullptr,
                                              added.defined() ? rows<T>(added) : kernels::Rows<const T>{},
                                              static_cast<T*>(output.mutable_data_ptr()),
                                              num_tokens,
                                              merged.size(1),
                                              channels};
    for_row_width<T>(channels, {source, added, output}, [&](auto width) {
      device::launch({batch * num_tokens, threads_for_row(channels, width)},
                     kernels::tokens::gather_rows<decltype(width)::value, T>, args);
    });
  });
  return output;
}

at::Tensor unmerge_tokens_backward_cuda(const at::Tensor& grad, const at::Tensor& assign, int64_t num_groups) {
  check_unmerge_tokens_backward(grad, assign, num_groups);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto batch = grad.size(0), num_tokens = grad.size(1), channels = grad.size(2);
  const auto groups = group_members_cuda(assign, num_groups);
  const auto g = with_contiguous_rows(grad);
  auto grad_merged = at::empty({batch, num_groups, channels}, grad.options());

  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::SegmentSum<T> args{rows<T>(g),
                                              nullptr,
                                              groups.offsets.template const_data_ptr<int64_t>(),
                                              groups.members.template const_data_ptr<int64_t>(),
                                              static_cast<T*>(grad_merged.mutable_data_ptr()),
                                              nullptr,
                                              num_tokens,
                                              num_groups,
                                              channels,
                                              /*normalize=*/false};
    for_row_width<T>(channels, {g, grad_merged}, [&](auto width) {
      device::launch({batch * num_groups, threads_for_row(channels, width)},
                     kernels::tokens::segment_sum<decltype(width)::value, T>, args);
    });
  });
  return grad_merged;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("unmerge_tokens", unmerge_tokens_cuda);
  m.impl("_unmerge_tokens_backward", unmerge_tokens_backward_cuda);
}

}  // namespace torchops
