#include "tokens/cuda/assignment.h"

#include <ATen/ops/empty.h>

#include "tokens/cuda/launches.h"

namespace torchops {

TokensOfGroups group_members_cuda(const at::Tensor& assign, int64_t num_groups) {
  const auto groups = assign.contiguous();
  const auto batch = groups.size(0), num_tokens = groups.size(1);
  const TokensOfGroups result{at::empty({batch, num_groups + 1}, groups.options()),
                              at::empty({batch, num_tokens}, groups.options())};
  auto counts = at::empty({batch, kernels::tokens::group_members_warps, num_groups}, groups.options().dtype(at::kInt));
  const kernels::tokens::GroupMembers args{groups.const_data_ptr<int64_t>(),
                                           result.offsets.mutable_data_ptr<int64_t>(),
                                           result.members.mutable_data_ptr<int64_t>(),
                                           counts.mutable_data_ptr<int32_t>(),
                                           num_tokens,
                                           num_groups};
  kernels::tokens::launch_group_members(args, batch);
  return result;
}

}  // namespace torchops
