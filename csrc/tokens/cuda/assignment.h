#pragma once

#include <ATen/core/Tensor.h>

namespace torchops {

// The tokens of each group on the current device: group m of row b has members[b, offsets[b, m]] ...
// members[b, offsets[b, m + 1] - 1], in ascending order. Values of assign outside of 0..M-1 are in no group.
struct GroupMembers {
  at::Tensor offsets;  // [B, M + 1]
  at::Tensor members;  // [B, N]
};
GroupMembers group_members_cuda(const at::Tensor& assign, int64_t num_groups);

}  // namespace torchops
