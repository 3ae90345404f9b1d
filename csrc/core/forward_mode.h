#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/AutogradState.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>

// Derivatives that travel forward with their tensors (torch.func.jvp, torch.autograd.forward_ad). What is linear in an
// input has itself as derivative; operators without a short formula refuse by name. Undefined tensors have none.

namespace torchops {

inline bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && c10::AutogradState::get_tls_state().get_fw_grad_mode() && tensor._fw_grad(0).defined();
}

inline bool any_has_tangent(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), has_tangent);
}

inline at::Tensor without_tangent(const at::Tensor& tensor) {
  return has_tangent(tensor) ? tensor._fw_primal(0) : tensor;
}

inline std::optional<at::Tensor> without_tangent(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(without_tangent(*tensor)) : std::nullopt;
}

inline at::Tensor tangent_or_zeros(const at::Tensor& tensor) {
  return has_tangent(tensor) ? tensor._fw_grad(0) : at::zeros_like(tensor);
}

inline at::Tensor with_tangent(const at::Tensor& tensor, const at::Tensor& tangent) {
  return at::_make_dual(tensor, tangent, 0);
}

// For derivatives that nobody has written: silence would be a derivative of zero.
inline void refuse_tangents(const char* op, at::TensorList tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_has_tangent(tensors), op,
                              ": the derivative in forward mode (torch.func.jvp, torch.autograd.forward_ad) is not "
                              "implemented");
}

}  // namespace torchops
