#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/autograd.h"
#include "core/forward_mode.h"
#include "sparse_attention/arguments.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "topk_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? key_bias=None,"
      " Tensor? pair_bias=None, Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, *,"
      " SymInt block_size=1, SymInt query_block=1, bool is_causal=False, float? scale=None) -> Tensor");
  m.def(
      "topk_attention_lse(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? key_bias=None,"
      " Tensor? pair_bias=None, Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, *,"
      " SymInt block_size=1, SymInt query_block=1, bool is_causal=False, float? scale=None)"
      " -> (Tensor output, Tensor logsumexp)");
  // What the backward needs beside: attention.h has the normalizer.
  m.def(
      "_topk_attention_forward(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? key_bias=None,"
      " Tensor? pair_bias=None, Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, *,"
      " SymInt block_size=1, SymInt query_block=1, bool is_causal=False, float? scale=None)"
      " -> (Tensor output, Tensor logsumexp, Tensor normalizer)");
  m.def(
      "_topk_attention_backward(Tensor? grad_output, Tensor? grad_logsumexp, Tensor? query, Tensor? key, Tensor? value,"
      " Tensor? indices, Tensor? output, Tensor normalizer, Tensor? key_bias, Tensor? pair_bias, Tensor? sink,"
      " Tensor? query_start, Tensor? key_start, *, SymInt block_size, SymInt query_block, bool is_causal,"
      " float? scale, bool[6] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value,"
      " Tensor grad_key_bias, Tensor grad_pair_bias, Tensor grad_sink)");
}

// ---- shapes -----------------------------------------------------------------------------------

TopkGradients empty_gradients(const TopkBackward& args, const TopkMask& mask) {
  const auto rows = [](bool wanted, const std::optional<at::Tensor>& model, const std::optional<at::Tensor>& columns) {
    return wanted ? empty_with_layout_of(*model, columns->sym_size(3)) : at::Tensor();
  };
  const auto side = [](bool wanted, const std::optional<at::Tensor>& of) {
    return wanted ? at::empty_symint(of->sym_sizes(), of->options()) : at::Tensor();
  };
  return {rows(mask.query(), args.query, args.query),     rows(mask.key(), args.key, args.key),
          rows(mask.value(), args.key, args.grad_output), side(mask.key_bias(), args.options.key_bias),
          side(mask.pair_bias(), args.options.pair_bias), side(mask.sink(), args.options.sink)};
}

namespace {

at::Tensor topk_attention_meta(const TopkInputs& inputs) {
  check_topk_attention("topk_attention", inputs);
  return empty_with_layout_of(inputs.query, inputs.value.sym_size(3));
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse_meta(const TopkInputs& inputs) {
  check_topk_attention("topk_attention_lse", inputs);
  return {empty_with_layout_of(inputs.query, inputs.value.sym_size(3)), empty_logsumexp(inputs.query)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_attention_forward_meta(const TopkInputs& inputs) {
  check_topk_attention("_topk_attention_forward", inputs);
  return {empty_with_layout_of(inputs.query, inputs.value.sym_size(3)), empty_logsumexp(inputs.query),
          empty_normalizer(inputs.query)};
}

TopkGradients topk_attention_backward_meta(const TopkBackward& args) {
  check_topk_attention_backward(args);
  return empty_gradients(args, args.mask);
}

// ---- the dispatcher -----------------------------------------------------------------------------

using Output = decltype(boundary<topk_attention_meta>);
using OutputAndLogsumexp = decltype(boundary<topk_attention_lse_meta>);
using OutputForBackward = decltype(boundary<topk_attention_forward_meta>);

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor call_topk_attention(const TopkInputs& inputs) {
  static const auto op = find<Output>("torchops::topk_attention");
  return call(op, inputs);
}

std::tuple<at::Tensor, at::Tensor> call_topk_attention_lse(const TopkInputs& inputs) {
  static const auto op = find<OutputAndLogsumexp>("torchops::topk_attention_lse");
  return call(op, inputs);
}

// ---- gradient ---------------------------------------------------------------------------------
// With a gradient to come both operators call another one, and check first, for errors name the operator.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct TopkAttention : torch::autograd::Function<TopkAttention> {
  // The tensors that have gradients are among the arguments, where autograd looks for them, and in the inputs.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::optional<at::Tensor>& given_key_bias,
                               const std::optional<at::Tensor>& given_pair_bias,
                               const std::optional<at::Tensor>& given_sink, const TopkInputs& inputs) {
    static const auto op = find<OutputForBackward>("torchops::_topk_attention_forward");
    const auto key_bias = value_or_undefined(given_key_bias), pair_bias = value_or_undefined(given_pair_bias),
               sink = value_or_undefined(given_sink);
    const auto wants = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
    const TopkMask mask{{wants(query), wants(key), wants(value), wants(key_bias), wants(pair_bias), wants(sink)}};
    const TopkOptions& options = inputs.options;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, logsumexp, normalizer] = call(op, inputs);
    const auto needed = [](bool is_needed, const at::Tensor& tensor) { return is_needed ? tensor : at::Tensor(); };
    const bool probabilities = mask.probabilities();
    ctx->save_for_backward({needed(probabilities, query), needed(probabilities, key), needed(mask.scores(), value),
                            needed(probabilities, inputs.indices), needed(mask.delta(), output), normalizer,
                            needed(probabilities, key_bias), needed(probabilities, pair_bias),
                            needed(mask.sink(), sink), needed(probabilities, value_or_undefined(options.query_start)),
                            needed(probabilities, value_or_undefined(options.key_start))});
    ctx->saved_data["block_size"] = options.block_size;
    ctx->saved_data["query_block"] = options.query_block;
    ctx->saved_data["is_causal"] = options.is_causal;
    ctx->saved_data["scale"] = options.scale;
    GivenTensors::save(ctx, {query, key, value, key_bias, pair_bias, sink});
    // Most losses do not use the log-sum-exp: its gradient then stays undefined.
    ctx->set_materialize_grads(false);
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<decltype(backward_boundary<topk_attention_backward_meta>)>("torchops::_topk_attention_backward");
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const auto tensor = [&saved](int position) { return optional_tensor(saved[position]); };
    std::array<bool, 6> output_mask;
    for (int position = 0; position < 6; ++position) {
      output_mask[position] = GivenTensors::needs_grad(ctx, position);
    }
    // The log-sum-exp does not depend on values.
    output_mask[2] = output_mask[2] && grads[0].defined();
    std::tie(result[0], result[1], result[2], result[3], result[4], result[5]) =
        op.call(optional_tensor(grads[0]), optional_tensor(grads[1]), tensor(0), tensor(1), tensor(2), tensor(3),
                tensor(4), saved[5], tensor(6), tensor(7), tensor(8), tensor(9), tensor(10),
                ctx->saved_data["block_size"].toSymInt(), ctx->saved_data["query_block"].toSymInt(),
                ctx->saved_data["is_causal"].toBool(), ctx->saved_data["scale"].toOptional<double>(), output_mask);
    return result;
  }
};

variable_list apply(const TopkInputs& inputs) {
  const TopkOptions& options = inputs.options;
  return TopkAttention::apply(inputs.query, inputs.key, inputs.value, options.key_bias, options.pair_bias, options.sink,
                              inputs);
}

// Undefined where an argument is absent.
std::array<at::Tensor, 6> differentiable(const TopkInputs& inputs) {
  const TopkOptions& options = inputs.options;
  return {inputs.query,
          inputs.key,
          inputs.value,
          value_or_undefined(options.key_bias),
          value_or_undefined(options.pair_bias),
          value_or_undefined(options.sink)};
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse_autograd(const TopkInputs& inputs) {
  const auto [query, key, value, key_bias, pair_bias, sink] = differentiable(inputs);
  refuse_tangents("topk_attention_lse", {query, key, value, key_bias, pair_bias, sink});
  if (any_requires_grad({query, key, value, key_bias, pair_bias, sink})) {
    check_topk_attention("topk_attention_lse", inputs);
    const auto outputs = apply(inputs);
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_topk_attention_lse(inputs);
}

at::Tensor topk_attention_autograd(const TopkInputs& inputs) {
  const auto [query, key, value, key_bias, pair_bias, sink] = differentiable(inputs);
  refuse_tangents("topk_attention", {query, key, value, key_bias, pair_bias, sink});
  if (any_requires_grad({query, key, value, key_bias, pair_bias, sink})) {
    check_topk_attention("topk_attention", inputs);
    return apply(inputs)[0];
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_topk_attention(inputs);
}

// ---- autocast ---------------------------------------------------------------------------------

// Scores are computed in float32 whatever the inputs: biases and sinks keep their dtype.
template <auto op, c10::DeviceType device, c10::DispatchKey dispatch_key>
auto lowered(const TopkInputs& inputs) {
  const c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
  const auto lower = [dtype = at::autocast::get_autocast_dtype(device)](const at::Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return op({lower(inputs.query), lower(inputs.key), lower(inputs.value), inputs.indices, inputs.options});
}

template <auto op>
constexpr auto lowered_on_cpu = boundary<lowered<op, at::kCPU, c10::DispatchKey::AutocastCPU>>;
template <auto op>
constexpr auto lowered_on_cuda = boundary<lowered<op, at::kCUDA, c10::DispatchKey::AutocastCUDA>>;

}  // namespace

TORCH_LIBRARY_IMPL(torchops, Meta, m) {
  m.impl("topk_attention", boundary<topk_attention_meta>);
  m.impl("topk_attention_lse", boundary<topk_attention_lse_meta>);
  m.impl("_topk_attention_forward", boundary<topk_attention_forward_meta>);
  m.impl("_topk_attention_backward", backward_boundary<topk_attention_backward_meta>);
}

TORCH_LIBRARY_IMPL(torchops, Autograd, m) {
  m.impl("topk_attention", boundary<topk_attention_autograd>);
  m.impl("topk_attention_lse", boundary<topk_attention_lse_autograd>);
  m.impl("_topk_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_topk_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(torchops, AutocastCPU, m) {
  m.impl("topk_attention", lowered_on_cpu<call_topk_attention>);
  m.impl("topk_attention_lse", lowered_on_cpu<call_topk_attention_lse>);
}

TORCH_LIBRARY_IMPL(torchops, AutocastCUDA, m) {
  m.impl("topk_attention", lowered_on_cuda<call_topk_attention>);
  m.impl("topk_attention_lse", lowered_on_cuda<call_topk_attention_lse>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor topk_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& indices, c10::SymInt block_size, c10::SymInt query_block, bool is_causal,
                          std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
                          const std::optional<at::Tensor>& pair_bias, const std::optional<at::Tensor>& sink,
                          const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  return call_topk_attention({query,
                              key,
                              value,
                              indices,
                              {std::move(block_size), std::move(query_block), is_causal, scale, key_bias, pair_bias,
                               sink, query_start, key_start}});
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& indices,
    c10::SymInt block_size, c10::SymInt query_block, bool is_causal, std::optional<double> scale,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& pair_bias,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
    const std::optional<at::Tensor>& key_start) {
  return call_topk_attention_lse({query,
                                  key,
                                  value,
                                  indices,
                                  {std::move(block_size), std::move(query_block), is_causal, scale, key_bias, pair_bias,
                                   sink, query_start, key_start}});
}

}  // namespace torchops
