#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "tokens/assignment.h"
#include "tokens/tokens.h"

namespace torchops {

TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "merge_tokens(Tensor input, Tensor assign, SymInt num_groups, *, Tensor? weight=None, bool normalize=True)"
      " -> (Tensor merged, Tensor total)");
  m.def(
      "_merge_tokens_backward(Tensor grad_merged, Tensor grad_total, Tensor? input, Tensor assign, Tensor? weight,"
      " Tensor? merged, Tensor total, *, bool normalize, bool[2] output_mask)"
      " -> (Tensor grad_input, Tensor grad_weight)");
}

// ---- checks -----------------------------------------------------------------------------------

void check_merge_tokens(const at::Tensor& input, const at::Tensor& assign, const c10::SymInt& num_groups,
                        const std::optional<at::Tensor>& weight) {
  const Checks check("merge_tokens");
  check.rank("input", input, "[B, N, C]");
  check.floating("input", input);
  const c10::SymInt tokens[] = {input.sym_size(0), input.sym_size(1)};
  check.shape("assign", assign, "[B, N]", tokens);
  check.dtype("assign", assign, at::kLong);
  check.same_device("assign", assign, "input", input);
  check.at_most("num_groups", num_groups, "the largest 32-bit integer", largest_num_groups);
  if (weight) {
    check.shape("weight", *weight, "[B, N]", tokens);
    check.floating("weight", *weight);
    check.same_device("weight", *weight, "input", input);
  }
}

void check_merge_tokens_backward(const at::Tensor& grad_merged, const at::Tensor& grad_total,
                                 const std::optional<at::Tensor>& input, const at::Tensor& assign,
                                 const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& merged,
                                 const at::Tensor& total, std::array<bool, 2> output_mask) {
  const Checks check("_merge_tokens_backward");
  check.rank("grad_merged", grad_merged, "[B, M, C]");
  check.floating("grad_merged", grad_merged);
  check.rank("assign", assign, "[B, N]");
  check.dtype("assign", assign, at::kLong);
  check.same_device("assign", assign, "grad_merged", grad_merged);
  const auto batch = grad_merged.sym_size(0), channels = grad_merged.sym_size(2);
  const auto num_tokens = assign.sym_size(1);
  const c10::SymInt tokens[] = {batch, num_tokens};
  check.shape("assign", assign, "[B, N]", tokens);
  for (const auto& [name, per_group] : {std::pair{"grad_total", &grad_total}, std::pair{"total", &total}}) {
    check.shape(name, *per_group, "[B, M]", {{batch, grad_merged.sym_size(1)}});
    check.dtype(name, *per_group, at::toOpMathType(grad_merged.scalar_type()));
    check.same_device(name, *per_group, "grad_merged", grad_merged);
  }
  if (weight) {
    check.shape("weight", *weight, "[B, N]", tokens);
    check.floating("weight", *weight);
    check.same_device("weight", *weight, "grad_merged", grad_merged);
  }
  if (output_mask[1]) {
    check.given("weight", weight, "its gradient is asked for");
    check.given("input", input, "the gradient to weight is asked for");
    check.given("merged", merged, "the gradient to weight is asked for");
    check.shape("input", *input, "[B, N, C]", {{batch, num_tokens, channels}});
    check.shape("merged", *merged, "[B, M, C]", grad_merged.sym_sizes());
    for (const auto& [name, saved] : {std::pair{"input", &*input}, std::pair{"merged", &*merged}}) {
      check.same_dtype(name, *saved, "grad_merged", grad_merged);
      check.same_device(name, *saved, "grad_merged", grad_merged);
    }
  }
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> merge_tokens_meta(const at::Tensor& input, const at::Tensor& assign,
                                                     c10::SymInt num_groups, const std::optional<at::Tensor>& weight,
                                                     bool /*normalize*/) {
  check_merge_tokens(input, assign, num_groups, weight);
  const auto batch = input.sym_size(0), channels = input.sym_size(2);
  return {at::empty_symint({batch, num_groups, channels}, input.options()),
          at::empty_symint({batch, num_groups}, input.options().dtype(at::toOpMathType(input.scalar_type())))};
}

std::tuple<at::Tensor, at::Tensor> merge_tokens_backward_meta(
    const at::Tensor& grad_merged, const at::Tensor& grad_total, const std::optional<at::Tensor>& input,
    const at::Tensor& assign, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& merged,
    const at::Tensor& total, bool /*normalize*/, std::array<bool, 2> output_mask) {
  check_merge_tokens_backward(grad_merged, grad_total, input, assign, weight, merged, total, output_mask);
  at::Tensor grad_input, grad_weight;
  if (output_mask[0]) {
    grad_input =
        at::empty_symint({assign.sym_size(0), assign.sym_size(1), grad_merged.sym_size(2)}, grad_merged.options());
  }
  if (output_mask[1]) {
    grad_weight = at::empty_symint(weight->sym_sizes(), weight->options());
  }
  return {grad_input, grad_weight};
}

// ---- gradient ---------------------------------------------------------------------------------

struct MergeTokens : torch::autograd::Function<MergeTokens> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                                                const at::Tensor& assign, c10::SymInt num_groups,
                                                const std::optional<at::Tensor>& weight, bool normalize) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [merged, total] = torchops::merge_tokens(input, assign, std::move(num_groups), weight, normalize);
    // The rows themselves are needed for the gradient to the weights only.
    const bool for_weight = weight && weight->requires_grad();
    ctx->save_for_backward({for_weight ? input : at::Tensor(), assign, value_or_undefined(weight),
                            for_weight ? merged : at::Tensor(), total});
    if (!for_weight) {
      ctx->mark_non_differentiable({total});
    }
    ctx->saved_data["normalize"] = normalize;
    TensorArguments::save(ctx, {input, assign, value_or_undefined(weight)});
    return {merged, total};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("torchops::_merge_tokens_backward", "")
                               .typed<std::tuple<at::Tensor, at::Tensor>(
                                   const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                   const at::Tensor&, const std::optional<at::Tensor>&,
                                   const std::optional<at::Tensor>&, const at::Tensor&, bool, std::array<bool, 2>)>();
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 2> output_mask{TensorArguments::needs_grad(ctx, 0), TensorArguments::needs_grad(ctx, 2)};
    const auto [grad_input, grad_weight] =
        op.call(grads[0], grads[1], optional_tensor(saved[0]), saved[1], optional_tensor(saved[2]),
                optional_tensor(saved[3]), saved[4], ctx->saved_data["normalize"].toBool(), output_mask);
    return {grad_input, {}, {}, grad_weight, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> merge_tokens_autograd(const at::Tensor& input, const at::Tensor& assign,
                                                         c10::SymInt num_groups,
                                                         const std::optional<at::Tensor>& weight, bool normalize) {
  const auto outputs = MergeTokens::apply(input, assign, std::move(num_groups), weight, normalize);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, Meta, m) {
  m.impl("merge_tokens", merge_tokens_meta);
  m.impl("_merge_tokens_backward", merge_tokens_backward_meta);
}

TORCH_LIBRARY_IMPL(torchops, Autograd, m) {
  m.impl("merge_tokens", merge_tokens_autograd);
  m.impl("_merge_tokens_backward", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> merge_tokens(const at::Tensor& input, const at::Tensor& assign,
                                                c10::SymInt num_groups, const std::optional<at::Tensor>& weight,
                                                bool normalize) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torchops::merge_tokens", "").typed<decltype(merge_tokens)>();
  return op.call(input, assign, std::move(num_groups), weight, normalize);
}

}  // namespace torchops
