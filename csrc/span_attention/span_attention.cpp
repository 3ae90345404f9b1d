#include "span_attention/span_attention.h"

#include "core/attention/autograd.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "span_attention/arguments.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "span_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias=None, Tensor? sink=None,"
      " Tensor? query_start=None, Tensor? key_start=None, *, SymInt block_size=1, SymInt left=-1, SymInt right=-1,"
      " bool is_causal=False, float? scale=None) -> Tensor");
  m.def(
      "span_attention_lse(Tensor query, Tensor key, Tensor value, Tensor? key_bias=None, Tensor? sink=None,"
      " Tensor? query_start=None, Tensor? key_start=None, *, SymInt block_size=1, SymInt left=-1, SymInt right=-1,"
      " bool is_causal=False, float? scale=None) -> (Tensor output, Tensor logsumexp)");
  // What the backward needs beside: attention.h has the normalizer.
  m.def(
      "_span_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_bias=None, Tensor? sink=None,"
      " Tensor? query_start=None, Tensor? key_start=None, *, SymInt block_size=1, SymInt left=-1, SymInt right=-1,"
      " bool is_causal=False, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor normalizer)");
  m.def(
      "_span_attention_backward(Tensor? grad_output, Tensor? grad_logsumexp, Tensor? query, Tensor? key, Tensor? value,"
      " Tensor? output, Tensor normalizer, Tensor? key_bias, Tensor? sink, Tensor? query_start, Tensor? key_start, *,"
      " SymInt block_size, SymInt left, SymInt right, bool is_causal, float? scale, bool[5] output_mask)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_key_bias, Tensor grad_sink)");
}

// ---- checks -----------------------------------------------------------------------------------

void check_span_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const SpanOptions& options) {
  const Checks check(op);
  check_attention(check, query, key, value, options);
  check.at_least("block_size", options.block_size, 1);
  check.at_least("left", options.left, -1);
  check.at_least("right", options.right, -1);
}

void check_span_attention_backward(const SpanBackward& args) {
  constexpr const char* op = "_span_attention_backward";
  const Checks check(op);
  check_attention_given(check, args, args.options, args.mask);
  if (args.query && args.key) {
    check_span_attention(op, *args.query, *args.key, value_or_undefined(args.value), args.options);
  }
  check_attention_rows(check, args, args.options);
}

namespace {

at::Tensor span_attention_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const SpanOptions& options) {
  check_span_attention("span_attention", query, key, value, options);
  return empty_with_layout_of(query, value.sym_size(3));
}

std::tuple<at::Tensor, at::Tensor> span_attention_lse_meta(const at::Tensor& query, const at::Tensor& key,
                                                           const at::Tensor& value, const SpanOptions& options) {
  check_span_attention("span_attention_lse", query, key, value, options);
  return {empty_with_layout_of(query, value.sym_size(3)), empty_logsumexp(query)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_forward_meta(const at::Tensor& query,
                                                                           const at::Tensor& key,
                                                                           const at::Tensor& value,
                                                                           const SpanOptions& options) {
  check_span_attention("_span_attention_forward", query, key, value, options);
  return {empty_with_layout_of(query, value.sym_size(3)), empty_logsumexp(query), empty_normalizer(query)};
}

SpanGradients span_attention_backward_meta(const SpanBackward& args) {
  check_span_attention_backward(args);
  return empty_attention_gradients(args, args.options, args.mask);
}

// ---- calls ------------------------------------------------------------------------------------

at::Tensor call_span_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const SpanOptions& options) {
  static const auto op = find_operator<decltype(span_attention_meta)>("span_attention");
  return op(query, key, value, options);
}

std::tuple<at::Tensor, at::Tensor> call_span_attention_lse(const at::Tensor& query, const at::Tensor& key,
                                                           const at::Tensor& value, const SpanOptions& options) {
  static const auto op = find_operator<decltype(span_attention_lse_meta)>("span_attention_lse");
  return op(query, key, value, options);
}

// ---- gradient ---------------------------------------------------------------------------------
// With a gradient to come both operators call another one, and check first, for errors name the operator.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// key_bias and sink, which have gradients, stand among the options too.
struct SpanAttention : torch::autograd::Function<SpanAttention> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::optional<at::Tensor>& key_bias,
                               const std::optional<at::Tensor>& sink, const SpanOptions& options) {
    static const auto op = find_operator<decltype(span_attention_forward_meta)>("_span_attention_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, logsumexp, normalizer] = op(query, key, value, options);
    save_attention<5>(ctx, {query, key, value, value_or_undefined(key_bias), value_or_undefined(sink)}, options, output,
                      normalizer, {});
    ctx->saved_data["block_size"] = options.block_size;
    ctx->saved_data["left"] = options.left;
    ctx->saved_data["right"] = options.right;
    ctx->saved_data["is_causal"] = options.is_causal;
    ctx->saved_data["scale"] = options.scale;
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_operator<decltype(span_attention_backward_meta)>("_span_attention_backward");
    if (!grads[0].defined() && !grads[1].defined()) {
      return variable_list(6);
    }
    const SavedAttention saved(ctx, grads);
    const auto block_size = ctx->saved_data["block_size"].toSymInt(), left = ctx->saved_data["left"].toSymInt(),
               right = ctx->saved_data["right"].toSymInt();
    const SpanOptions options{saved.sides(),
                              block_size,
                              left,
                              right,
                              ctx->saved_data["is_causal"].toBool(),
                              ctx->saved_data["scale"].toOptional<double>()};
    const auto [grad_query, grad_key, grad_value, grad_bias, grad_sink] =
        op(saved.gradients(), options, saved.mask<5>());
    return {grad_query, grad_key, grad_value, grad_bias, grad_sink, {}};
  }
};

// The output and the log-sum-exp where autograd will ask for gradients, else nothing.
variable_list recorded(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const SpanOptions& options) {
  const auto bias = value_or_undefined(options.key_bias), sink = value_or_undefined(options.sink);
  refuse_tangents(op, {query, key, value, bias, sink});
  if (!any_requires_grad({query, key, value, bias, sink})) {
    return {};
  }
  check_span_attention(op, query, key, value, options);
  return SpanAttention::apply(query, key, value, options.key_bias, options.sink, options);
}

std::tuple<at::Tensor, at::Tensor> span_attention_lse_autograd(const at::Tensor& query, const at::Tensor& key,
                                                               const at::Tensor& value, const SpanOptions& options) {
  if (const auto outputs = recorded("span_attention_lse", query, key, value, options); !outputs.empty()) {
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_span_attention_lse(query, key, value, options);
}

at::Tensor span_attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   const SpanOptions& options) {
  if (const auto outputs = recorded("span_attention", query, key, value, options); !outputs.empty()) {
    return outputs[0];
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_span_attention(query, key, value, options);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
void register_span_autocast(torch::Library& m) {
  m.impl("span_attention", flattened<LoweredAttention<call_span_attention, device, key>::call>);
  m.impl("span_attention_lse", flattened<LoweredAttention<call_span_attention_lse, device, key>::call>);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("span_attention", flattened<span_attention_meta>);
  m.impl("span_attention_lse", flattened<span_attention_lse_meta>);
  m.impl("_span_attention_forward", flattened<span_attention_forward_meta>);
  m.impl("_span_attention_backward", flattened<span_attention_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("span_attention", flattened<span_attention_autograd>);
  m.impl("span_attention_lse", flattened<span_attention_lse_autograd>);
  m.impl("_span_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_span_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  register_span_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  register_span_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor span_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          c10::SymInt block_size, c10::SymInt left, c10::SymInt right, bool is_causal,
                          std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
                          const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
                          const std::optional<at::Tensor>& key_start) {
  return call_span_attention(query, key, value,
                             {{key_bias, sink, query_start, key_start}, block_size, left, right, is_causal, scale});
}

std::tuple<at::Tensor, at::Tensor> span_attention_lse(const at::Tensor& query, const at::Tensor& key,
                                                      const at::Tensor& value, c10::SymInt block_size, c10::SymInt left,
                                                      c10::SymInt right, bool is_causal, std::optional<double> scale,
                                                      const std::optional<at::Tensor>& key_bias,
                                                      const std::optional<at::Tensor>& sink,
                                                      const std::optional<at::Tensor>& query_start,
                                                      const std::optional<at::Tensor>& key_start) {
  return call_span_attention_lse(query, key, value,
                                 {{key_bias, sink, query_start, key_start}, block_size, left, right, is_causal, scale});
}

}  // namespace torchops
