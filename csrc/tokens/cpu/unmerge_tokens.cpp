#include "tokens/unmerge_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/parallel.h"
#include "core/tensors.h"
#include "tokens/cpu/assignment.h"
#include "tokens/cpu/gather_rows_kernel.h"
#include "tokens/cpu/segment_sum_kernel.h"

namespace torchops {
namespace {

at::Tensor unmerge_tokens_cpu(const at::Tensor& merged, const at::Tensor& assign,
                              const std::optional<at::Tensor>& residual) {
  check_unmerge_tokens(merged, assign, residual);
  const auto batch = merged.size(0), num_tokens = assign.size(1), channels = merged.size(2);
  const auto groups = checked_assignment("unmerge_tokens", assign, merged.size(1));
  const auto source = with_contiguous_rows(merged);
  const auto added = residual ? with_contiguous_rows(*residual) : at::Tensor();
  auto output = at::empty({batch, num_tokens, channels}, merged.options());

  for_dtype(merged.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::GatherRows<T> args{rows<T>(source),
                                              groups.const_data_ptr<int64_t>(),
                                              nullptr,
                                              nullptr,
                                              added.defined() ? rows<T>(added) : kernels::Rows<const T>{},
                                              static_cast<T*>(output.mutable_data_ptr()),
                                              num_tokens,
                                              merged.size(1),
                                              channels};
    parallel_units(batch * num_tokens, channels,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, gather_rows<T>)(args, begin, end); });
  });
  return output;
}

at::Tensor unmerge_tokens_backward_cpu(const at::Tensor& grad, const at::Tensor& assign, int64_t num_groups) {
  check_unmerge_tokens_backward(grad, assign, num_groups);
  const auto batch = grad.size(0), num_tokens = grad.size(1), channels = grad.size(2);
  const auto groups = group_members(checked_assignment("_unmerge_tokens_backward", assign, num_groups), num_groups);
  const auto g = with_contiguous_rows(grad);
  auto grad_merged = at::empty({batch, num_groups, channels}, grad.options());

  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::SegmentSum<T> args{rows<T>(g),
                                              nullptr,
                                              groups.offsets.const_data_ptr<int64_t>(),
                                              groups.members.const_data_ptr<int64_t>(),
                                              static_cast<T*>(grad_merged.mutable_data_ptr()),
                                              nullptr,
                                              num_tokens,
                                              num_groups,
                                              channels,
                                              /*normalize=*/false};
    parallel_units(batch * num_groups, channels,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, segment_sum<T>)(args, begin, end); });
  });
  return grad_merged;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CPU, m) {
  m.impl("unmerge_tokens", unmerge_tokens_cpu);
  m.impl("_unmerge_tokens_backward", unmerge_tokens_backward_cpu);
}

}  // namespace torchops
