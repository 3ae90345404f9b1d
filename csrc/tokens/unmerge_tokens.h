#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// What every device's unmerge_tokens starts with.

namespace torchops {

void check_unmerge_tokens(const at::Tensor& merged, const at::Tensor& assign,
                          const std::optional<at::Tensor>& residual);

void check_unmerge_tokens_backward(const at::Tensor& grad, const at::Tensor& assign, const c10::SymInt& num_groups);

}  // namespace torchops
