#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

// What every device's merge_tokens starts with.

namespace torchops {

void check_merge_tokens(const at::Tensor& input, const at::Tensor& assign, const c10::SymInt& num_groups,
                        const std::optional<at::Tensor>& weight);

void check_merge_tokens_backward(const std::optional<at::Tensor>& grad_merged,
                                 const std::optional<at::Tensor>& grad_total, const std::optional<at::Tensor>& input,
                                 const at::Tensor& assign, const std::optional<at::Tensor>& weight,
                                 const std::optional<at::Tensor>& total, bool normalize,
                                 std::array<bool, 2> output_mask);

}  // namespace torchops
