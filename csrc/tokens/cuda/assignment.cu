#include "tokens/cuda/assignment.h"

#include <ATen/ops/empty.h>

#include "core/cuda/launch.h"
#include "tokens/cuda/group_members.cuh"

namespace torchops {

TokensOfGroups group_members_cuda(const at::Tensor& assign, int64_t num_groups) {
  const auto groups = assign.contiguous();
  const auto batch = groups.size(0), num_tokens = groups.size(1);
  const TokensOfGroups result{at::empty({batch, num_groups + 1}, groups.options()),
                              at::empty({batch, num_tokens}, groups.options())};
  constexpr int64_t warps = kernels::tokens::group_members_warps;
  auto counts = at::empty({batch, warps, num_groups}, groups.options().dtype(at::kInt));
  const kernels::tokens::GroupMembers args{groups.const_data_ptr<int64_t>(),
                                           result.offsets.mutable_data_ptr<int64_t>(),
                                           result.members.mutable_data_ptr<int64_t>(),
                                           counts.mutable_data_ptr<int32_t>(),
                                           num_tokens,
                                           num_groups};
  device::launch({batch, warps * device::warp_size, device::shared_size<int32_t>(device::max_warps)},
                 kernels::tokens::group_members, args);
  return result;
}

}  // namespace torchops
