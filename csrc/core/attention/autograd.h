#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cstddef>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

#include "core/attention/arguments.h"
#include "core/autograd.h"

// What every attention does alike between its operators and autograd, resp. autocast.

namespace torchops {

// In forward, whose output and log-sum-exp both may have gradients: keeps what the gradients asked for are made of.
// `inputs` are those that have gradients, in the order of AttentionMask and absent ones undefined; `of_probabilities`
// is what else the family makes probabilities of.
template <size_t count>
void save_attention(torch::autograd::AutogradContext* ctx, const std::array<at::Tensor, count>& inputs,
                    const AttentionSides& sides, const at::Tensor& output, const at::Tensor& normalizer,
                    std::initializer_list<at::Tensor> of_probabilities) {
  AttentionMask<count> mask;
  for (size_t i = 0; i < count; ++i) {
    mask.wanted[i] = inputs[i].defined() && inputs[i].requires_grad();
  }
  const auto needed = [](bool is_needed, const at::Tensor& tensor) { return is_needed ? tensor : at::Tensor(); };
  const bool probabilities = mask.probabilities();
  torch::autograd::variable_list saved{needed(probabilities, inputs[0]),
                                       needed(probabilities, inputs[1]),
                                       needed(mask.scores(), inputs[2]),
                                       needed(mask.delta(), output),
                                       normalizer,
                                       needed(probabilities, inputs[3]),
                                       needed(mask.sink(), inputs[4]),
                                       needed(probabilities, value_or_undefined(sides.query_start)),
                                       needed(probabilities, value_or_undefined(sides.key_start))};
  for (const auto& tensor : of_probabilities) {
    saved.push_back(needed(probabilities, tensor));
  }
  ctx->save_for_backward(saved);
  GivenTensors::save(ctx, inputs);
  // Most losses do not use the log-sum-exp: its gradient then stays undefined.
  ctx->set_materialize_grads(false);
}

// In backward, what was kept, as arguments of the operator that computes gradients.
class SavedAttention {
 public:
  SavedAttention(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads)
      : ctx_(ctx), grad_output_(optional_tensor(grads[0])), grad_logsumexp_(optional_tensor(grads[1])) {
    for (const auto& tensor : ctx->get_saved_variables()) {
      saved_.push_back(optional_tensor(tensor));
    }
  }

  AttentionGradients gradients() const {
    return {grad_output_, grad_logsumexp_, saved_[0], saved_[1], saved_[2], saved_[3], *saved_[4]};
  }
  AttentionSides sides() const { return {saved_[5], saved_[6], saved_[7], saved_[8]}; }
  const std::optional<at::Tensor>& of_probabilities(size_t index) const { return saved_[9 + index]; }

  template <size_t count>
  AttentionMask<count> mask() const {
    AttentionMask<count> mask;
    for (size_t i = 0; i < count; ++i) {
      mask.wanted[i] = GivenTensors::needs_grad(ctx_, static_cast<int>(i));
    }
    // The log-sum-exp does not depend on values.
    mask.wanted[2] = mask.wanted[2] && grad_output_;
    return mask;
  }

 private:
  torch::autograd::AutogradContext* ctx_;
  std::optional<at::Tensor> grad_output_, grad_logsumexp_;
  std::vector<std::optional<at::Tensor>> saved_;
};

// An operator under autocast. Scores are computed in float32 whatever the inputs: only what is multiplied is lowered.
template <auto op, c10::DeviceType device, c10::DispatchKey dispatch_key,
          typename Function = std::remove_pointer_t<decltype(op)>>
struct LoweredAttention;

template <auto op, c10::DeviceType device, c10::DispatchKey dispatch_key, typename Result, typename... Rest>
struct LoweredAttention<op, device, dispatch_key,
                        Result(const at::Tensor&, const at::Tensor&, const at::Tensor&, Rest...)> {
  static Result call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, Rest... rest) {
    const c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
    const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
      return at::autocast::cached_cast(dtype, tensor, device);
    };
    return op(lower(query), lower(key), lower(value), rest...);
  }
};

}  // namespace torchops
