#include "tokens/unmerge_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/parallel.h"
#include "tokens/arguments.h"
#include "tokens/cpu/assignment.h"
#include "tokens/cpu/gather_rows_kernel.h"
#include "tokens/cpu/segment_sum_kernel.h"

namespace torchops {
namespace {

at::Tensor unmerge_tokens_cpu(const at::Tensor& merged, const at::Tensor& assign,
                              const std::optional<at::Tensor>& residual) {
  check_unmerge_tokens(merged, assign, residual);
  const auto groups = checked_assignment("unmerge_tokens", assign, merged.size(1));
  const auto source = with_contiguous_rows(merged);
  const auto added = residual ? with_contiguous_rows(*residual) : at::Tensor();
  auto output = at::empty({assign.size(0), assign.size(1), merged.size(2)}, merged.options());

  for_dtype(merged.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto args = gather_rows_arguments<T>(source, groups, {}, {}, added, output);
    parallel_units(groups.numel(), merged.size(2),
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, gather_rows<T>)(args, begin, end); });
  });
  return output;
}

at::Tensor unmerge_tokens_backward_cpu(const at::Tensor& grad, const at::Tensor& assign, int64_t num_groups) {
  check_unmerge_tokens_backward(grad, assign, num_groups);
  const auto groups = group_members(checked_assignment("_unmerge_tokens_backward", assign, num_groups), num_groups);
  const auto g = with_contiguous_rows(grad);
  auto grad_merged = at::empty({grad.size(0), num_groups, grad.size(2)}, grad.options());

  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto args =
        segment_sum_arguments<T>(g, {}, groups.offsets, groups.members, grad_merged, {}, /*normalize=*/false);
    parallel_units(grad.size(0) * num_groups, grad.size(2),
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
