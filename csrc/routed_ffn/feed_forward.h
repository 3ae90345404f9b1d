#pragma once

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "routed_ffn/arguments.h"
#include "routed_ffn/grouped_rows.h"
#include "routed_ffn/route.h"

// routed_ffn as every device computes it. Rows are entries of the index, sorted by block; for those of block g
//
//   z = W1_g x + b1_g,  h = activation of z,  y = sum over a token's slots of c (W2_g h + b2_g)
//
// and with LoRA factors z += lora_scale lora_b1 lora_a1 x, and alike in the second layer. Device is grouped_rows.h's.

namespace torchops {

// Weights that can be read as they lie.
class ReadableWeights {
 public:
  explicit ReadableWeights(const FeedForwardWeights& given)
      : w1_(with_a_unit_stride(given.w1)),
        w2_(with_a_unit_stride(given.w2)),
        w_gate_(readable(given.w_gate)),
        lora_a1_(readable(given.lora_a1)),
        lora_b1_(readable(given.lora_b1)),
        lora_a2_(readable(given.lora_a2)),
        lora_b2_(readable(given.lora_b2)),
        weights_{w1_, w2_, given.b1, given.b2, w_gate_, lora_a1_, lora_b1_, lora_a2_, lora_b2_} {}
  ReadableWeights(const ReadableWeights&) = delete;

  const FeedForwardWeights* operator->() const { return &weights_; }

 private:
  at::Tensor w1_, w2_;
  std::optional<at::Tensor> w_gate_, lora_a1_, lora_b1_, lora_a2_, lora_b2_;
  FeedForwardWeights weights_;

  static std::optional<at::Tensor> readable(const std::optional<at::Tensor>& weight) {
    return weight ? std::optional(with_a_unit_stride(*weight)) : std::nullopt;
  }
};

template <typename Device>
class FeedForward {
 public:
  FeedForward(const at::Tensor& index, const std::optional<at::Tensor>& gate, const FeedForwardWeights& weights,
              const FeedForwardOptions& options)
      : weights_(weights),
        options_(options),
        activation_(options.kernel_activation()),
        dtype_(weights.w1.scalar_type()),
        wide_(at::toOpMathType(dtype_)),
        rows_(sorted(as_tokens(index), weights.w1.size(0))) {
    if (gate) {
      gate_ = gate->to(wide_).contiguous().view({-1});
      sorted_gate_ = rows_.sorted(*gate_);
    }
  }

  int64_t num_rows() const { return rows_.num_rows(); }
  int64_t preactivation_size() const {
    return weights_->w1.size(1) + (weights_->w_gate ? weights_->w_gate->size(1) : 0);
  }

  // tokens [T, d] -> [M, preactivations], sums that are not rounded where more is added to them
  at::Tensor first_layer(const at::Tensor& tokens) const {
    const auto x = entering(tokens);
    const auto is_wide = weights_->lora_a1.has_value() || scales_first_layer();
    const auto sums = at::empty({num_rows(), preactivation_size()}, options(is_wide ? wide_ : dtype_));
    for_each_first_weight([&](const at::Tensor& weight, int64_t first) {
      const auto size = weight.size(1);
      const auto bias = weights_->b1 ? std::optional(weights_->b1->narrow(1, first, size)) : std::nullopt;
      rows_.multiply(x, weight.transpose(1, 2), bias, sums.narrow(1, first, size));
    });
    if (scales_first_layer()) {
      sums.mul_(*sorted_gate_);
    }
    if (weights_->lora_a1) {
      rows_.multiply(low_rank(x, *weights_->lora_a1), weights_->lora_b1->transpose(1, 2), std::nullopt, sums,
                     /*adds=*/true);
    }
    return sums;
  }

  struct Activated {
    at::Tensor preactivation;  // of the weights' dtype
    at::Tensor hidden;         // [M, N]
  };
  // Where the preactivation is not kept, hidden takes its place.
  Activated activate(const at::Tensor& sums, bool keep) const {
    const bool is_wide = sums.scalar_type() != dtype_;
    const auto preactivation = is_wide ? at::empty(sums.sizes(), options(dtype_)) : sums;
    const auto size = weights_->w2.size(2);
    const auto hidden = keep ? at::empty({num_rows(), size}, options(dtype_)) : preactivation.narrow(1, 0, size);
    for_dtype(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = kernels::accumulate_t<T>;
      Device::run(kernels::routed_ffn::Activate<T>{activation_, rows_.groups(), size,
                                                   is_wide ? static_cast<const A*>(sums.const_data_ptr()) : nullptr,
                                                   static_cast<T*>(preactivation.mutable_data_ptr()),
                                                   static_cast<T*>(hidden.mutable_data_ptr()), hidden.stride(0)});
    });
    return {preactivation, hidden};
  }

  // hidden [M, N] -> output [T, d]
  at::Tensor second_layer(const at::Tensor& hidden, int64_t num_tokens) const {
    const bool has_block_bias = weights_->b2 && weights_->b2->dim() == 2;
    const auto sums = at::empty({num_rows(), weights_->w2.size(1)}, options(wide_));
    rows_.multiply({hidden, false}, weights_->w2.transpose(1, 2), has_block_bias ? weights_->b2 : std::nullopt, sums);
    if (scales_first_layer()) {
      sums.mul_(*sorted_gate_);
    }
    if (weights_->lora_a2) {
      rows_.multiply(low_rank({hidden, false}, *weights_->lora_a2), per_block(*weights_->lora_b2).transpose(1, 2),
                     std::nullopt, sums, /*adds=*/true);
    }
    return slot_sums(sums, options_.gate_at == "output", weights_->b2 && !has_block_bias ? weights_->b2 : std::nullopt,
                     num_tokens);
  }

  // tokens may be undefined where no gradient takes them.
  FeedForwardGradients gradients(const FeedForwardMask& mask, const at::Tensor& grad, const at::Tensor& tokens,
                                 const at::Tensor& preactivation) const {
    FeedForwardGradients grads;
    auto& [of_input, of_gate, of_w1, of_w2, of_b1, of_b2, of_w_gate, of_a1, of_b1_factor, of_a2, of_b2_factor] = grads;
    const bool for_gate = mask.gate() && gate_;
    const auto dots = for_gate ? at::zeros({num_rows()}, options(wide_)) : at::Tensor();
    const OperandRows dy{grad, true};
    const bool for_x = mask.input() || (for_gate && options_.gate_at != "output");
    const bool for_first_layer = for_x || mask.w1() || mask.w_gate() || mask.b1() || mask.lora_a1() || mask.lora_b1();
    const auto at_output = scales_output() ? sorted_gate_ : std::nullopt;

    // The second layer, down to the gradient of the preactivation.
    at::Tensor narrowed;  // lora_scale lora_b2^T dy
    at::Tensor grad_z, hidden;
    const bool for_hidden = mask.w2() || mask.lora_a2() || mask.lora_b2();
    if (for_first_layer || for_hidden || (for_gate && scales_output())) {
      if (weights_->lora_a2) {
        narrowed = rows_.product(dy, per_block(*weights_->lora_b2)).mul_(options_.lora_scale);
      }
      std::tie(grad_z, hidden) = activation_gradient(dy, narrowed, preactivation, for_first_layer, for_hidden,
                                                     for_gate && scales_output() ? dots : at::Tensor());
    }
    if (mask.w2()) {
      of_w2 = rows_.weight_gradient(dy, {hidden, false}, weights_->w2);
    }
    if (mask.lora_a2() || mask.lora_b2()) {
      const OperandRows h{scales_first_layer() ? activate(preactivation, true).hidden : hidden, false};
      if (mask.lora_a2()) {
        of_a2 = rows_.weight_gradient({narrowed, false}, h, *weights_->lora_a2);
      }
      if (mask.lora_b2()) {
        of_b2_factor =
            shared_or_not(*weights_->lora_b2).weight_gradient(dy, low_rank(h, *weights_->lora_a2), *weights_->lora_b2);
      }
    }
    if (weights_->b2 && weights_->b2->dim() == 2) {
      if (mask.b2()) {
        of_b2 = rows_.sums(dy, at_output);
      }
      if (for_gate && scales_output()) {
        add_bias_dots(dy, *weights_->b2, dots);
      }
    } else if (mask.b2()) {
      of_b2 = grad.sum(0);
    }

    // The first layer.
    const bool for_what_x_meets = mask.w1() || mask.w_gate() || mask.lora_a1() || mask.lora_b1();
    const auto x = for_what_x_meets ? entering(tokens) : OperandRows{};
    if (mask.w1() || mask.w_gate()) {
      const auto to_weights = scales_first_layer() ? grad_z.mul(*sorted_gate_).to(dtype_) : grad_z;
      for_each_first_weight([&](const at::Tensor& weight, int64_t first) {
        const bool is_w1 = first + weight.size(1) == preactivation_size();
        if (is_w1 ? mask.w1() : mask.w_gate()) {
          (is_w1 ? of_w1 : of_w_gate) =
              rows_.weight_gradient({to_weights.narrow(1, first, weight.size(1)), false}, x, weight);
        }
      });
    }
    if (mask.b1()) {
      of_b1 = rows_.sums({grad_z, false}, scales_first_layer() ? sorted_gate_ : std::nullopt);
    }
    at::Tensor first_narrowed;  // lora_scale lora_b1^T grad_z
    if (weights_->lora_a1 && (for_x || mask.lora_a1())) {
      first_narrowed = rows_.product({grad_z, false}, *weights_->lora_b1).mul_(options_.lora_scale);
    }
    if (mask.lora_a1()) {
      of_a1 = shared_or_not(*weights_->lora_a1).weight_gradient({first_narrowed, false}, x, *weights_->lora_a1);
    }
    if (mask.lora_b1()) {
      of_b1_factor = rows_.weight_gradient({grad_z, false}, low_rank(x, *weights_->lora_a1), *weights_->lora_b1);
    }
    if (for_x) {
      const auto sums = input_gradients(grad_z, first_narrowed, tokens,
                                        for_gate && options_.gate_at != "output" ? dots : at::Tensor());
      if (mask.input()) {
        of_input = slot_sums(sums, options_.gate_at == "input", std::nullopt, grad.size(0));
      }
    }
    of_gate = dots;
    return grads;
  }

 private:
  ReadableWeights weights_;
  const FeedForwardOptions& options_;
  kernels::routed_ffn::Activation activation_;
  at::ScalarType dtype_;
  at::ScalarType wide_;
  GroupedRows<Device> rows_;
  std::optional<at::Tensor> gate_;         // [T k]
  std::optional<at::Tensor> sorted_gate_;  // [M, 1]

  static GroupedRows<Device> sorted(const at::Tensor& index, int64_t num_blocks) {
    auto [order, offsets] = route_by(index, num_blocks, Device::sort);
    return {order, offsets, index.size(1)};
  }

  at::TensorOptions options(at::ScalarType dtype) const { return weights_->w1.options().dtype(dtype); }
  bool scales_first_layer() const { return gate_ && options_.gate_at == "both"; }
  bool scales_output() const { return gate_ && options_.gate_at != "input"; }

  OperandRows entering(const at::Tensor& tokens) const {
    if (gate_ && options_.gate_at == "input") {
      return {rows_.of_tokens(tokens).mul(*sorted_gate_).to(dtype_), false};
    }
    return {tokens, true};
  }

  // body(weight, its first column of the preactivation), w1's last
  template <typename Body>
  void for_each_first_weight(const Body& body) const {
    if (weights_->w_gate) {
      body(*weights_->w_gate, 0);
    }
    body(weights_->w1, preactivation_size() - weights_->w1.size(1));
  }

  at::Tensor per_block(const at::Tensor& factor) const {
    return factor.expand({rows_.num_blocks(), factor.size(1), factor.size(2)});
  }
  GroupedRows<Device> shared_or_not(const at::Tensor& factor) const {
    return factor.size(0) == rows_.num_blocks() ? rows_ : rows_.as_one_block();
  }

  // lora_scale a x [M, r]
  OperandRows low_rank(const OperandRows& x, const at::Tensor& a) const {
    return {rows_.product(x, per_block(a).transpose(1, 2)).mul_(options_.lora_scale), false};
  }

  at::Tensor slot_sums(const at::Tensor& sums, bool gated, const std::optional<at::Tensor>& bias,
                       int64_t num_tokens) const {
    return rows_.slot_sums(sums, gated ? gate_ : std::nullopt, bias, num_tokens, dtype_);
  }

  // dots += <bias of the block, rows>
  void add_bias_dots(const OperandRows& rows, const at::Tensor& bias, const at::Tensor& dots) const {
    const auto products = at::empty({num_rows(), 1}, options(wide_));
    rows_.multiply(rows, bias.unsqueeze(2), std::nullopt, products);
    rows_.add_dots(products, at::ones({num_rows(), 1}, options(dtype_)), dots);
  }

  // Gradient of the preactivation, and hidden times the gate that the output has.
  std::tuple<at::Tensor, at::Tensor> activation_gradient(const OperandRows& dy, const at::Tensor& narrowed,
                                                         const at::Tensor& preactivation, bool for_first_layer,
                                                         bool for_hidden, const at::Tensor& dots) const {
    const auto size = weights_->w2.size(2);
    const bool is_wide = narrowed.defined() && !scales_first_layer();
    const auto to_hidden = at::empty({num_rows(), size}, options(is_wide ? wide_ : dtype_));
    rows_.multiply(dy, weights_->w2, std::nullopt, to_hidden);
    at::Tensor plain;
    if (narrowed.defined()) {
      plain = is_wide ? to_hidden : at::empty({num_rows(), size}, options(wide_));
      rows_.multiply({narrowed, false}, *weights_->lora_a2, std::nullopt, plain, /*adds=*/is_wide);
    }
    const auto grad_z = for_first_layer ? at::empty_like(preactivation) : at::Tensor();
    const auto hidden = !for_hidden                         ? at::Tensor()
                        : to_hidden.scalar_type() == dtype_ ? to_hidden
                                                            : at::empty({num_rows(), size}, options(dtype_));
    for_dtype(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = kernels::accumulate_t<T>;
      const bool rounded = to_hidden.scalar_type() == dtype_;
      Device::run(kernels::routed_ffn::ActivateBackward<T>{
          activation_, rows_.groups(), size, static_cast<const T*>(preactivation.const_data_ptr()),
          rounded ? nullptr : static_cast<const A*>(to_hidden.const_data_ptr()),
          rounded ? static_cast<const T*>(to_hidden.const_data_ptr()) : nullptr,
          is_wide ? nullptr : data_or_null<A>(plain), scales_output() ? data_or_null<A>(*gate_) : nullptr,
          rows_.order(), mutable_data_or_null<T>(grad_z), mutable_data_or_null<T>(hidden),
          mutable_data_or_null<A>(dots)});
    });
    return {grad_z, hidden};
  }

  // Of each row's x [M, d], and of the gate that x or W1_g x is multiplied with.
  at::Tensor input_gradients(const at::Tensor& grad_z, const at::Tensor& narrowed, const at::Tensor& tokens,
                             const at::Tensor& dots) const {
    const auto sums = at::empty({num_rows(), weights_->w1.size(2)}, options(wide_));
    bool adds = false;
    for_each_first_weight([&](const at::Tensor& weight, int64_t first) {
      rows_.multiply({grad_z.narrow(1, first, weight.size(1)), false}, weight, std::nullopt, sums, adds);
      adds = true;
    });
    if (scales_first_layer()) {
      if (dots.defined()) {
        rows_.add_dots(sums, tokens, dots);
        if (weights_->b1) {
          add_bias_dots({grad_z, false}, *weights_->b1, dots);
        }
      }
      sums.mul_(*sorted_gate_);
    }
    if (narrowed.defined()) {
      rows_.multiply({narrowed, false}, per_block(*weights_->lora_a1), std::nullopt, sums, /*adds=*/true);
    }
    if (dots.defined() && !scales_first_layer()) {
      rows_.add_dots(sums, tokens, dots);
    }
    return sums;
  }
};

// ---- operators ----------------------------------------------------------------------------------

template <typename Device>
std::tuple<at::Tensor, at::Tensor> feed_forward(const at::Tensor& input, const at::Tensor& index,
                                                const std::optional<at::Tensor>& gate,
                                                const FeedForwardWeights& weights, const FeedForwardOptions& options,
                                                bool keep) {
  const FeedForward<Device> layer(index, gate, weights, options);
  const auto tokens = as_tokens(input);
  const auto [preactivation, hidden] = layer.activate(layer.first_layer(tokens), keep);
  return {layer.second_layer(hidden, tokens.size(0)).view(input.sizes()), preactivation};
}

template <typename Device>
at::Tensor routed_ffn_on(const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate,
                         const FeedForwardWeights& weights, const FeedForwardOptions& options) {
  check_routed_ffn("routed_ffn", input, index, gate, weights, options);
  const c10::DeviceGuard guard(input.device());
  return std::get<0>(feed_forward<Device>(input, index, gate, weights, options, /*keep=*/false));
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> routed_ffn_forward_on(const at::Tensor& input, const at::Tensor& index,
                                                         const std::optional<at::Tensor>& gate,
                                                         const FeedForwardWeights& weights,
                                                         const FeedForwardOptions& options) {
  check_routed_ffn("_routed_ffn_forward", input, index, gate, weights, options);
  const c10::DeviceGuard guard(input.device());
  return feed_forward<Device>(input, index, gate, weights, options, /*keep=*/true);
}

template <typename Device>
FeedForwardGradients routed_ffn_backward_on(const FeedForwardBackward& args) {
  check_routed_ffn_backward(args);
  const c10::DeviceGuard guard(args.grad_output.device());
  const FeedForward<Device> layer(args.index, args.gate, args.weights, args.options);
  const auto grad = as_tokens(args.grad_output);
  const auto tokens = args.input ? as_tokens(*args.input) : at::Tensor();
  const auto preactivation = args.options.recompute ? layer.activate(layer.first_layer(tokens), true).preactivation
                                                    : args.preactivation->contiguous();
  auto grads = layer.gradients(args.mask(), grad, tokens, preactivation);
  auto& grad_input = std::get<0>(grads);
  auto& grad_gate = std::get<1>(grads);
  if (grad_input.defined()) {
    grad_input = grad_input.view(args.grad_output.sizes());
  }
  if (grad_gate.defined()) {
    grad_gate = grad_gate.to(args.gate->scalar_type()).view(args.gate->sizes());
  }
  return grads;
}

}  // namespace torchops
