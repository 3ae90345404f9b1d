#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

namespace torchops {

inline at::Tensor value_or_undefined(const std::optional<at::Tensor>& tensor) {
  return tensor.value_or(at::Tensor());
}

// An undefined tensor is an absent one; operators take absent ones as std::nullopt.
inline std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// Whether autograd will ask for a gradient to one of them.
inline bool any_requires_grad(at::TensorList tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
           return tensor.defined() && tensor.requires_grad();
         });
}

// Which tensor arguments were given, and so which gradients a backward has to compute:
// AutogradContext::needs_input_grad counts only those, an absent optional tensor shifts all behind it. Here positions
// are those in the operator's own list of tensor arguments.
class GivenTensors {
 public:
  // In forward: all tensor arguments in schema order, absent ones as undefined tensors.
  static void save(torch::autograd::AutogradContext* ctx, at::TensorList arguments) {
    int64_t given = 0;
    int64_t bit = 1;
    for (const auto& argument : arguments) {
      given |= argument.defined() ? bit : 0;
      bit <<= 1;
    }
    ctx->saved_data["given_tensors"] = given;
  }

  // In backward: whether the gradient of the tensor argument at this position is asked for.
  static bool needs_grad(torch::autograd::AutogradContext* ctx, int position) {
    const auto given = ctx->saved_data["given_tensors"].toInt();
    if (!((given >> position) & 1)) {
      return false;
    }
    const auto given_before = given & ((int64_t{1} << position) - 1);
    return ctx->needs_input_grad(static_cast<size_t>(__builtin_popcountll(given_before)));
  }
};

}  // namespace torchops
