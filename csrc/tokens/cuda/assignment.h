#pragma once

#include <ATen/core/Tensor.h>

#include "tokens/assignment.h"

namespace torchops {

// On the current device.
TokensOfGroups group_members_cuda(const at::Tensor& assign, int64_t num_groups);

}  // namespace torchops
