#pragma once

#include <ATen/core/Tensor.h>

#include "tokens/assignment.h"

namespace torchops {

// On the current device.
GroupMembers group_members_cuda(const at::Tensor& assign, int64_t num_groups);

}  // namespace torchops
