#include "tokens/unmerge_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "tokens/arguments.h"
#include "tokens/cuda/assignment.h"
#include "tokens/cuda/gather_rows.cuh"
#include "tokens/cuda/segment_sum.cuh"

namespace torchops {
namespace {

at::Tensor unmerge_tokens_cuda(const at::Tensor& merged, const at::Tensor& assign,
                               const std::optional<at::Tensor>& residual) {
  check_unmerge_tokens(merged, assign, residual);
  const c10::cuda::CUDAGuard guard(merged.device());
  const auto channels = merged.size(2);
  const auto groups = assign.contiguous();
  const auto source = with_contiguous_rows(merged);
  const auto added = residual ? with_contiguous_rows(*residual) : at::Tensor();
  auto output = at::empty({assign.size(0), assign.size(1), channels}, merged.options());

  for_dtype(merged.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto args = gather_rows_arguments<T>(source, groups, {}, {}, added, output);
    for_row_width<T>(channels, {source, added, output}, [&](auto width) {
      device::launch({groups.numel(), threads_for_row(channels, width)},
                     kernels::tokens::gather_rows<decltype(width)::value, T>, args);
    });
  });
  return output;
}

at::Tensor unmerge_tokens_backward_cuda(const at::Tensor& grad, const at::Tensor& assign, int64_t num_groups) {
  check_unmerge_tokens_backward(grad, assign, num_groups);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto channels = grad.size(2);
  const auto groups = group_members_cuda(assign, num_groups);
  const auto g = with_contiguous_rows(grad);
  auto grad_merged = at::empty({grad.size(0), num_groups, channels}, grad.options());

  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto args =
        segment_sum_arguments<T>(g, {}, groups.offsets, groups.members, grad_merged, {}, /*normalize=*/false);
    for_row_width<T>(channels, {g, grad_merged}, [&](auto width) {
      device::launch({grad.size(0) * num_groups, threads_for_row(channels, width)},
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
