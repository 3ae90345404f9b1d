#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

// What every device's merge_tokens starts with.

namespace torchops {

void check_merge_tokens(const at::Tensor& input, const at::Tensor& assign, const c10::SymInt& num_groups,
                        const std::optional<at::Tensor>& weight);

// The arguments of _merge_tokens_backward: a gradient that nobody has is absent, but one is given.
struct MergeBackward {
  const std::optional<at::Tensor>& grad_merged;  // [B, M, C]
  const std::optional<at::Tensor>& grad_total;   // [B, M]
  const std::optional<at::Tensor>& input;        // [B, N, C]
  const at::Tensor& assign;                      // [B, N]
  const std::optional<at::Tensor>& weight;       // [B, N]
  const std::optional<at::Tensor>& total;        // [B, M]
  bool normalize;
  std::array<bool, 2> output_mask;  // of the gradients to input and weight

  auto members() const {
    return std::tie(grad_merged, grad_total, input, assign, weight, total, normalize, output_mask);
  }
  const at::Tensor& given_grad() const { return grad_merged ? *grad_merged : *grad_total; }
};

void check_merge_tokens_backward(const MergeBackward& args);

}  // namespace torchops
