#include "tokens/merge_tokens.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "tokens/assignment.h"
#include "tokens/tokens.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "merge_tokens(Tensor input, Tensor assign, SymInt num_groups, Tensor? weight=None, *, bool normalize=True)"
      " -> (Tensor merged, Tensor total)");
  // The gradients that come in may be absent. The one to the weights has the accumulation dtype.
  m.def(
      "_merge_tokens_backward(Tensor? grad_merged, Tensor? grad_total, Tensor? input, Tensor assign, Tensor? weight,"
      " Tensor? total, *, bool normalize, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_weight)");
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
  check.at_most("N", input.sym_size(1), "the largest 32-bit integer", largest_num_tokens);
  check.at_most("num_groups", num_groups, "the largest 32-bit integer", largest_num_groups);
  if (weight) {
    check.shape("weight", *weight, "[B, N]", tokens);
    check.floating("weight", *weight);
    check.same_device("weight", *weight, "input", input);
  }
}

void check_merge_tokens_backward(const MergeBackward& args) {
  const auto& [grad_merged, grad_total, input, assign, weight, total, normalize, output_mask] = args;
  const Checks check("_merge_tokens_backward");
  if (!grad_merged) {
    check.given("grad_total", grad_total, "grad_merged is None");
  }
  const char* const known_name = grad_merged ? "grad_merged" : "grad_total";
  const at::Tensor& known = args.given_grad();
  check.rank(known_name, known, grad_merged ? "[B, M, C]" : "[B, M]");
  check.floating(known_name, known);
  check.rank("assign", assign, "[B, N]");
  check.dtype("assign", assign, at::kLong);
  check.same_device("assign", assign, known_name, known);
  const auto batch = known.sym_size(0), num_tokens = assign.sym_size(1);
  const c10::SymInt tokens[] = {batch, num_tokens};
  check.shape("assign", assign, "[B, N]", tokens);
  check.at_most("N", num_tokens, "the largest 32-bit integer", largest_num_tokens);
  for (const auto& [name, per_group] : {std::pair{"grad_total", &grad_total}, std::pair{"total", &total}}) {
    if (*per_group) {
      check.shape(name, **per_group, "[B, M]", {{batch, known.sym_size(1)}});
      check.dtype(name, **per_group, at::toOpMathType(known.scalar_type()));
      check.same_device(name, **per_group, known_name, known);
    }
  }
  if (weight) {
    check.shape("weight", *weight, "[B, N]", tokens);
    check.floating("weight", *weight);
    check.same_device("weight", *weight, known_name, known);
  }
  if (grad_merged && normalize) {
    check.given("total", total, "rows were normalised");
  }
  if (grad_merged && output_mask[1]) {
    check.given("input", input, "the gradient to weight is asked for");
  }
  if (grad_merged && input) {
    check.shape("input", *input, "[B, N, C]", {{batch, num_tokens, grad_merged->sym_size(2)}});
    check.same_dtype("input", *input, "grad_merged", *grad_merged);
    check.same_device("input", *input, "grad_merged", *grad_merged);
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

std::tuple<at::Tensor, at::Tensor> merge_tokens_backward_meta(const MergeBackward& args) {
  check_merge_tokens_backward(args);
  const at::Tensor &known = args.given_grad(), &assign = args.assign;
  at::Tensor grad_input, grad_weight;
  if (args.output_mask[0] && args.grad_merged) {
    grad_input = at::empty_symint({assign.sym_size(0), assign.sym_size(1), known.sym_size(2)}, known.options());
  }
  if (args.output_mask[1]) {
    grad_weight = at::empty_symint(assign.sym_sizes(), known.options().dtype(at::toOpMathType(known.scalar_type())));
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
    // The rows themselves are needed for the gradient to the weights only, and a sum's gradient to its weights does
    // without these.
    const bool for_weight = weight && weight->requires_grad();
    const bool weight_counts = weight && (input.requires_grad() || normalize);
    ctx->save_for_backward({for_weight ? input : at::Tensor(), assign, weight_counts ? *weight : at::Tensor(),
                            normalize ? total : at::Tensor()});
    if (for_weight) {
      ctx->saved_data["weight_dtype"] = weight->scalar_type();
    } else {
      ctx->mark_non_differentiable({total});
    }
    ctx->saved_data["normalize"] = normalize;
    GivenTensors::save(ctx, {input, assign, value_or_undefined(weight)});
    // What nobody's loss depends on is absent rather than zeros, which times an infinity are NaN.
    ctx->set_materialize_grads(false);
    return {merged, total};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(merge_tokens_backward_meta)>("_merge_tokens_backward");
    const std::array<bool, 2> output_mask{GivenTensors::needs_grad(ctx, 0), GivenTensors::needs_grad(ctx, 2)};
    if (!grads[0].defined() && !(grads[1].defined() && output_mask[1])) {
      return torch::autograd::variable_list(5);
    }
    const auto saved = ctx->get_saved_variables();
    auto [grad_input, grad_weight] =
        op(optional_tensor(grads[0]), optional_tensor(grads[1]), optional_tensor(saved[0]), saved[1],
           optional_tensor(saved[2]), optional_tensor(saved[3]), ctx->saved_data["normalize"].toBool(), output_mask);
    if (output_mask[1]) {
      grad_weight = grad_weight.to(ctx->saved_data["weight_dtype"].toScalarType());
    }
    return {grad_input, {}, {}, grad_weight, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> merge_tokens_autograd(const at::Tensor& input, const at::Tensor& assign,
                                                         c10::SymInt num_groups,
                                                         const std::optional<at::Tensor>& weight, bool normalize) {
  refuse_tangents("merge_tokens", {value_or_undefined(weight)});
  if (has_tangent(input)) {  // linear in the input
    auto [merged, total] = torchops::merge_tokens(without_tangent(input), assign, num_groups, weight, normalize);
    const auto [tangent, same] = torchops::merge_tokens(tangent_or_zeros(input), assign, num_groups, weight, normalize);
    return {with_tangent(merged, tangent), total};
  }
  if (any_requires_grad({input, value_or_undefined(weight)})) {
    const auto outputs = MergeTokens::apply(input, assign, std::move(num_groups), weight, normalize);
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return torchops::merge_tokens(input, assign, std::move(num_groups), weight, normalize);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("merge_tokens", merge_tokens_meta);
  m.impl("_merge_tokens_backward", flattened<merge_tokens_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("merge_tokens", merge_tokens_autograd);
  m.impl("_merge_tokens_backward", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> merge_tokens(const at::Tensor& input, const at::Tensor& assign,
                                                c10::SymInt num_groups, const std::optional<at::Tensor>& weight,
                                                bool normalize) {
  static const auto op = find_operator<decltype(merge_tokens)>("merge_tokens");
  return op(input, assign, num_groups, weight, normalize);
}

}  // namespace torchops
