#include "routed_ffn/grouped_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "routed_ffn/routed_ffn.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "grouped_linear(Tensor input, Tensor weight, Tensor order, Tensor offsets, Tensor? bias=None, *, int? slots=None)"
      " -> Tensor");
  m.def(
      "_grouped_linear_backward(Tensor grad_output, Tensor? input, Tensor weight, Tensor order, Tensor offsets, *,"
      " int? slots, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

// ---- checks -----------------------------------------------------------------------------------

namespace {

void check_rows(const Checks& check, const at::Tensor& weight, const at::Tensor& order, const at::Tensor& offsets,
                std::optional<int64_t> slots) {
  check.rank("weight", weight, "[G, N, K]");
  check.floating("weight", weight);
  check.rank("order", order, "[M]");
  check.dtype("order", order, at::kInt);
  check.same_device("order", order, "weight", weight);
  check.shape("offsets", offsets, "[G + 1]", {{weight.sym_size(0) + 1}});
  check.dtype("offsets", offsets, at::kInt);
  check.same_device("offsets", offsets, "weight", weight);
  check.at_least("G", weight.sym_size(0), 1);
  if (slots) {
    check.at_least("slots", *slots, 1);
  }
}

void check_input(const Checks& check, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                 std::optional<int64_t> slots) {
  check.rank("input", input, slots ? "[T, K]" : "[M, K]");
  check.same_dtype("weight", weight, "input", input);
  check.same_device("weight", weight, "input", input);
  check.equal("input's last dimension", input.sym_size(1), "weight's K", weight.sym_size(2));
  if (slots) {
    check.equal("order's length M", order.sym_size(0), "T slots", input.sym_size(0) * *slots);
  } else {
    check.equal("input's first dimension", input.sym_size(0), "order's length M", order.sym_size(0));
  }
}

}  // namespace

void check_grouped_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                          const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                          std::optional<int64_t> slots) {
  const Checks check("grouped_linear");
  check_rows(check, weight, order, offsets, slots);
  check_input(check, input, weight, order, slots);
  if (bias) {
    check.shape("bias", *bias, "[G, N]", {{weight.sym_size(0), weight.sym_size(1)}});
    check.same_dtype("bias", *bias, "input", input);
    check.same_device("bias", *bias, "input", input);
  }
}

void check_grouped_linear_backward(const GroupedLinearBackward& args) {
  const Checks check("_grouped_linear_backward");
  check_rows(check, args.weight, args.order, args.offsets, args.slots);
  check.shape("grad_output", args.grad_output, "[M, N]", {{args.order.sym_size(0), args.weight.sym_size(1)}});
  check.same_dtype("grad_output", args.grad_output, "weight", args.weight);
  check.same_device("grad_output", args.grad_output, "weight", args.weight);
  if (args.slots) {
    check.multiple_of("order's length M", args.order.sym_size(0), "slots", *args.slots);
  }
  if (args.input) {
    check_input(check, *args.input, args.weight, args.order, args.slots);
  } else if (args.output_mask[1]) {
    check.given("input", args.input, "the weight's gradient takes it");
  }
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor grouped_linear_meta(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                               const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                               std::optional<int64_t> slots) {
  check_grouped_linear(input, weight, order, offsets, bias, slots);
  return at::empty_symint({order.sym_size(0), weight.sym_size(1)}, input.options());
}

GroupedLinearGradients grouped_linear_backward_meta(const GroupedLinearBackward& args) {
  check_grouped_linear_backward(args);
  const auto rows = args.slots ? args.order.sym_size(0) / *args.slots : args.order.sym_size(0);
  const auto options = args.grad_output.options();
  return {args.output_mask[0] ? at::empty_symint({rows, args.weight.sym_size(2)}, options) : at::Tensor(),
          args.output_mask[1] ? at::empty_like(args.weight) : at::Tensor(),
          args.output_mask[2] ? at::empty_symint({args.weight.sym_size(0), args.weight.sym_size(1)}, options)
                              : at::Tensor()};
}

// ---- gradient ---------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& order, const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                            std::optional<int64_t> slots) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({weight.requires_grad() ? input : at::Tensor(), weight, order, offsets});
    ctx->set_materialize_grads(false);
    ctx->saved_data["slots"] = slots;
    GivenTensors::save(ctx, {input, weight, order, offsets, value_or_undefined(bias)});
    return torchops::grouped_linear(input, weight, order, offsets, bias, slots);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find_operator<flat_signature<decltype(grouped_linear_backward_meta)>>("_grouped_linear_backward");
    if (!grads[0].defined()) {
      return variable_list(6);
    }
    const auto saved = ctx->get_saved_variables();
    const auto input = optional_tensor(saved[0]);
    const auto [grad_input, grad_weight, grad_bias] = op(GroupedLinearBackward{
        grads[0],
        input,
        saved[1],
        saved[2],
        saved[3],
        ctx->saved_data["slots"].toOptional<int64_t>(),
        {GivenTensors::needs_grad(ctx, 0), GivenTensors::needs_grad(ctx, 1), GivenTensors::needs_grad(ctx, 4)}});
    return {grad_input, grad_weight, {}, {}, grad_bias, {}};
  }
};

// Linear in the input and the weight, each by itself, and in the bias.
at::Tensor grouped_linear_forward_mode(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                                       const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                                       std::optional<int64_t> slots) {
  const auto x = without_tangent(input), w = without_tangent(weight);
  const auto output = torchops::grouped_linear(x, w, order, offsets, without_tangent(bias), slots);
  const auto bias_tangent = bias && has_tangent(*bias) ? std::optional(tangent_or_zeros(*bias)) : std::nullopt;
  auto tangent = torchops::grouped_linear(tangent_or_zeros(input), w, order, offsets, bias_tangent, slots);
  if (has_tangent(weight)) {
    tangent = tangent + torchops::grouped_linear(x, tangent_or_zeros(weight), order, offsets, std::nullopt, slots);
  }
  return with_tangent(output, tangent);
}

at::Tensor grouped_linear_autograd(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                                   const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                                   std::optional<int64_t> slots) {
  if (any_has_tangent({input, weight, value_or_undefined(bias)})) {
    return grouped_linear_forward_mode(input, weight, order, offsets, bias, slots);
  }
  if (any_requires_grad({input, weight, value_or_undefined(bias)})) {
    return GroupedLinear::apply(input, weight, order, offsets, bias, slots);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return torchops::grouped_linear(input, weight, order, offsets, bias, slots);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor grouped_linear_autocast(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                                   const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                                   std::optional<int64_t> slots) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return torchops::grouped_linear(lower(input), lower(weight), order, offsets,
                                  bias ? std::optional(lower(*bias)) : std::nullopt, slots);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("grouped_linear", grouped_linear_meta);
  m.impl("_grouped_linear_backward", flattened<grouped_linear_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("grouped_linear", grouped_linear_autograd);
  m.impl("_grouped_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("grouped_linear", grouped_linear_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("grouped_linear", grouped_linear_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor grouped_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                          const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
                          std::optional<int64_t> slots) {
  static const auto op = find_operator<decltype(grouped_linear_meta)>("grouped_linear");
  return op(input, weight, order, offsets, bias, slots);
}

}  // namespace torchops
