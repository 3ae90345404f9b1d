#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "tokens/assignment.h"

// What the CPU operators that read or make assignments share.

namespace torchops {

// The assignment as contiguous [B, N]; throws a ValueError that names the first value outside -1..M-1.
at::Tensor checked_assignment(const char* op, const at::Tensor& assign, int64_t num_groups);

TokensOfGroups group_members(const at::Tensor& assign, int64_t num_groups);

// The mask as contiguous [B, N]; throws a ValueError if a protected token is padding.
std::optional<at::Tensor> checked_padding_mask(const char* op, const std::optional<at::Tensor>& padding_mask,
                                               int64_t num_protected);

}  // namespace torchops
