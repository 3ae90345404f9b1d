#include "core/attention/autograd.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "sparse_attention/arguments.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "topk_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? key_bias=None, Tensor? sink=None,"
      " Tensor? query_start=None, Tensor? key_start=None, Tensor? pair_bias=None, *, SymInt block_size=1,"
      " SymInt query_block=1, bool is_causal=False, float? scale=None) -> Tensor");
  m.def(
      "topk_attention_lse(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? key_bias=None,"
      " Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, Tensor? pair_bias=None, *,"
      " SymInt block_size=1, SymInt query_block=1, bool is_causal=False, float? scale=None)"
      " -> (Tensor output, Tensor logsumexp)");
  // What the backward needs beside: core/attention/attention.h has the normalizer.
  m.def(
      "_topk_attention_forward(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? key_bias=None,"
      " Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, Tensor? pair_bias=None, *,"
      " SymInt block_size=1, SymInt query_block=1, bool is_causal=False, float? scale=None)"
      " -> (Tensor output, Tensor logsumexp, Tensor normalizer)");
  m.def(
      "_topk_attention_backward(Tensor? grad_output, Tensor? grad_logsumexp, Tensor? query, Tensor? key, Tensor? value,"
      " Tensor? output, Tensor normalizer, Tensor? indices, Tensor? key_bias, Tensor? sink, Tensor? query_start,"
      " Tensor? key_start, Tensor? pair_bias, *, SymInt block_size, SymInt query_block, bool is_causal, float? scale,"
      " bool[6] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_key_bias,"
      " Tensor grad_sink, Tensor grad_pair_bias)");
}

// ---- shapes -----------------------------------------------------------------------------------

namespace {

at::Tensor topk_attention_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& indices, const TopkOptions& options) {
  check_topk_attention("topk_attention", query, key, value, indices, options);
  return empty_with_layout_of(query, value.sym_size(3));
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse_meta(const at::Tensor& query, const at::Tensor& key,
                                                           const at::Tensor& value, const at::Tensor& indices,
                                                           const TopkOptions& options) {
  check_topk_attention("topk_attention_lse", query, key, value, indices, options);
  return {empty_with_layout_of(query, value.sym_size(3)), empty_logsumexp(query)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_attention_forward_meta(const at::Tensor& query,
                                                                           const at::Tensor& key,
                                                                           const at::Tensor& value,
                                                                           const at::Tensor& indices,
                                                                           const TopkOptions& options) {
  check_topk_attention("_topk_attention_forward", query, key, value, indices, options);
  return {empty_with_layout_of(query, value.sym_size(3)), empty_logsumexp(query), empty_normalizer(query)};
}

TopkGradients topk_attention_backward_meta(const TopkBackward& args) {
  check_topk_attention_backward(args);
  return std::tuple_cat(empty_attention_gradients(args, args.options, args.mask),
                        std::tuple(empty_side(args.mask.pair_bias(), args.options.pair_bias)));
}

// ---- calls ------------------------------------------------------------------------------------

at::Tensor call_topk_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& indices, const TopkOptions& options) {
  static const auto op = find_operator<decltype(topk_attention_meta)>("topk_attention");
  return op(query, key, value, indices, options);
}

std::tuple<at::Tensor, at::Tensor> call_topk_attention_lse(const at::Tensor& query, const at::Tensor& key,
                                                           const at::Tensor& value, const at::Tensor& indices,
                                                           const TopkOptions& options) {
  static const auto op = find_operator<decltype(topk_attention_lse_meta)>("topk_attention_lse");
  return op(query, key, value, indices, options);
}

// ---- gradient ---------------------------------------------------------------------------------
// With a gradient to come both operators call another one, and check first, for errors name the operator.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// key_bias, sink and pair_bias, which have gradients, stand among the options too.
struct TopkAttention : torch::autograd::Function<TopkAttention> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::optional<at::Tensor>& key_bias,
                               const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& pair_bias,
                               const at::Tensor& indices, const TopkOptions& options) {
    static const auto op = find_operator<decltype(topk_attention_forward_meta)>("_topk_attention_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, logsumexp, normalizer] = op(query, key, value, indices, options);
    const auto of_entries = value_or_undefined(pair_bias);
    save_attention<6>(ctx, {query, key, value, value_or_undefined(key_bias), value_or_undefined(sink), of_entries},
                      options, output, normalizer, {indices, of_entries});
    ctx->saved_data["block_size"] = options.block_size;
    ctx->saved_data["query_block"] = options.query_block;
    ctx->saved_data["is_causal"] = options.is_causal;
    ctx->saved_data["scale"] = options.scale;
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_operator<decltype(topk_attention_backward_meta)>("_topk_attention_backward");
    if (!grads[0].defined() && !grads[1].defined()) {
      return variable_list(8);
    }
    const SavedAttention saved(ctx, grads);
    const auto block_size = ctx->saved_data["block_size"].toSymInt(),
               query_block = ctx->saved_data["query_block"].toSymInt();
    const TopkOptions options{saved.sides(),
                              saved.of_probabilities(1),
                              block_size,
                              query_block,
                              ctx->saved_data["is_causal"].toBool(),
                              ctx->saved_data["scale"].toOptional<double>()};
    const auto [grad_query, grad_key, grad_value, grad_key_bias, grad_sink, grad_pair_bias] =
        op(saved.gradients(), saved.of_probabilities(0), options, saved.mask<6>());
    return {grad_query, grad_key, grad_value, grad_key_bias, grad_sink, grad_pair_bias, {}, {}};
  }
};

// The output and the log-sum-exp where autograd will ask for gradients, else nothing.
variable_list recorded(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const at::Tensor& indices, const TopkOptions& options) {
  const auto key_bias = value_or_undefined(options.key_bias), sink = value_or_undefined(options.sink),
             pair_bias = value_or_undefined(options.pair_bias);
  refuse_tangents(op, {query, key, value, key_bias, sink, pair_bias});
  if (!any_requires_grad({query, key, value, key_bias, sink, pair_bias})) {
    return {};
  }
  check_topk_attention(op, query, key, value, indices, options);
  return TopkAttention::apply(query, key, value, options.key_bias, options.sink, options.pair_bias, indices, options);
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse_autograd(const at::Tensor& query, const at::Tensor& key,
                                                               const at::Tensor& value, const at::Tensor& indices,
                                                               const TopkOptions& options) {
  if (const auto outputs = recorded("topk_attention_lse", query, key, value, indices, options); !outputs.empty()) {
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_topk_attention_lse(query, key, value, indices, options);
}

at::Tensor topk_attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   const at::Tensor& indices, const TopkOptions& options) {
  if (const auto outputs = recorded("topk_attention", query, key, value, indices, options); !outputs.empty()) {
    return outputs[0];
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_topk_attention(query, key, value, indices, options);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
void register_topk_autocast(torch::Library& m) {
  m.impl("topk_attention", flattened<LoweredAttention<call_topk_attention, device, key>::call>);
  m.impl("topk_attention_lse", flattened<LoweredAttention<call_topk_attention_lse, device, key>::call>);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("topk_attention", flattened<topk_attention_meta>);
  m.impl("topk_attention_lse", flattened<topk_attention_lse_meta>);
  m.impl("_topk_attention_forward", flattened<topk_attention_forward_meta>);
  m.impl("_topk_attention_backward", flattened<topk_attention_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("topk_attention", flattened<topk_attention_autograd>);
  m.impl("topk_attention_lse", flattened<topk_attention_lse_autograd>);
  m.impl("_topk_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_topk_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  register_topk_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  register_topk_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor topk_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& indices, c10::SymInt block_size, c10::SymInt query_block, bool is_causal,
                          std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
                          const std::optional<at::Tensor>& pair_bias, const std::optional<at::Tensor>& sink,
                          const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  return call_topk_attention(
      query, key, value, indices,
      {{key_bias, sink, query_start, key_start}, pair_bias, block_size, query_block, is_causal, scale});
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& indices,
    c10::SymInt block_size, c10::SymInt query_block, bool is_causal, std::optional<double> scale,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& pair_bias,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
    const std::optional<at::Tensor>& key_start) {
  return call_topk_attention_lse(
      query, key, value, indices,
      {{key_bias, sink, query_start, key_start}, pair_bias, block_size, query_block, is_causal, scale});
}

}  // namespace torchops
