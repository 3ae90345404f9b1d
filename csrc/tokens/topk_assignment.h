#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// What every device's topk_assignment starts with.

namespace torchops {

void check_topk_assignment(const at::Tensor& scores, const c10::SymInt& k, const c10::SymInt& num_protected,
                           const std::optional<at::Tensor>& padding_mask);

}  // namespace torchops
