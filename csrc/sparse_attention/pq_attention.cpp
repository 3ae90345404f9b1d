#include "sparse_attention/pq_attention.h"

#include "core/attention/autograd.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "pq_attention(Tensor query, Tensor key, Tensor value, Tensor query_codes, Tensor key_codes, SymInt k,"
      " Tensor? key_bias=None, Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, *,"
      " bool is_causal=False, float? scale=None, SymInt sink_keys=0, SymInt local_keys=0) -> Tensor");
  m.def(
      "pq_attention_lse(Tensor query, Tensor key, Tensor value, Tensor query_codes, Tensor key_codes, SymInt k,"
      " Tensor? key_bias=None, Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, *,"
      " bool is_causal=False, float? scale=None, SymInt sink_keys=0, SymInt local_keys=0)"
      " -> (Tensor output, Tensor logsumexp)");
  // What the backward needs beside: core/attention/attention.h has the normalizer.
  m.def(
      "_pq_attention_forward(Tensor query, Tensor key, Tensor value, Tensor query_codes, Tensor key_codes, SymInt k,"
      " Tensor? key_bias=None, Tensor? sink=None, Tensor? query_start=None, Tensor? key_start=None, *,"
      " bool is_causal=False, float? scale=None, SymInt sink_keys=0, SymInt local_keys=0)"
      " -> (Tensor output, Tensor logsumexp, Tensor normalizer)");
  m.def(
      "_pq_attention_backward(Tensor? grad_output, Tensor? grad_logsumexp, Tensor? query, Tensor? key, Tensor? value,"
      " Tensor? output, Tensor normalizer, Tensor? query_codes, Tensor? key_codes, SymInt k, Tensor? key_bias,"
      " Tensor? sink, Tensor? query_start, Tensor? key_start, *, bool is_causal, float? scale, SymInt sink_keys,"
      " SymInt local_keys, bool[5] output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value,"
      " Tensor grad_key_bias, Tensor grad_sink)");
}

// ---- checks -----------------------------------------------------------------------------------

void check_pq_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const CodesOfKeys& codes, const PqAttentionOptions& options) {
  const Checks check(op);
  check_attention(check, query, key, value, options);
  const auto& [query_codes, key_codes, k] = codes;
  check.rank("query_codes", query_codes, "[B, Hq, Lq, M]");
  check.shape("query_codes", query_codes, "[B, Hq, Lq, M]",
              {{query.sym_size(0), query.sym_size(1), query.sym_size(2), query_codes.sym_size(3)}});
  check.rank("key_codes", key_codes, "[B, Hkv, Lk, M]");
  check.shape("key_codes", key_codes, "[B, Hkv, Lk, M]",
              {{key.sym_size(0), key.sym_size(1), key.sym_size(2), query_codes.sym_size(3)}});
  check.same_device("query_codes", query_codes, "query", query);
  check_pq_topk(op, query_codes, key_codes, options.of_choice(k));
}

void check_pq_attention_backward(const PqAttentionBackward& args) {
  constexpr const char* op = "_pq_attention_backward";
  const Checks check(op);
  check_attention_given(check, args, args.options, args.mask);
  if (args.mask.probabilities()) {
    check.given("query_codes", args.query_codes, "probabilities are made of it");
    check.given("key_codes", args.key_codes, "probabilities are made of it");
  }
  if (args.query && args.key && args.query_codes && args.key_codes) {
    check_pq_attention(op, *args.query, *args.key, value_or_undefined(args.value),
                       {*args.query_codes, *args.key_codes, args.k}, args.options);
  }
  check_attention_rows(check, args, args.options);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

at::Tensor pq_attention_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const CodesOfKeys& codes, const PqAttentionOptions& options) {
  check_pq_attention("pq_attention", query, key, value, codes, options);
  return empty_with_layout_of(query, value.sym_size(3));
}

std::tuple<at::Tensor, at::Tensor> pq_attention_lse_meta(const at::Tensor& query, const at::Tensor& key,
                                                         const at::Tensor& value, const CodesOfKeys& codes,
                                                         const PqAttentionOptions& options) {
  check_pq_attention("pq_attention_lse", query, key, value, codes, options);
  return {empty_with_layout_of(query, value.sym_size(3)), empty_logsumexp(query)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pq_attention_forward_meta(const at::Tensor& query, const at::Tensor& key,
                                                                         const at::Tensor& value,
                                                                         const CodesOfKeys& codes,
                                                                         const PqAttentionOptions& options) {
  check_pq_attention("_pq_attention_forward", query, key, value, codes, options);
  return {empty_with_layout_of(query, value.sym_size(3)), empty_logsumexp(query), empty_normalizer(query)};
}

PqAttentionGradients pq_attention_backward_meta(const PqAttentionBackward& args) {
  check_pq_attention_backward(args);
  return empty_attention_gradients(args, args.options, args.mask);
}

// ---- calls ------------------------------------------------------------------------------------

at::Tensor call_pq_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const CodesOfKeys& codes, const PqAttentionOptions& options) {
  static const auto op = find_operator<decltype(pq_attention_meta)>("pq_attention");
  return op(query, key, value, codes, options);
}

std::tuple<at::Tensor, at::Tensor> call_pq_attention_lse(const at::Tensor& query, const at::Tensor& key,
                                                         const at::Tensor& value, const CodesOfKeys& codes,
                                                         const PqAttentionOptions& options) {
  static const auto op = find_operator<decltype(pq_attention_lse_meta)>("pq_attention_lse");
  return op(query, key, value, codes, options);
}

// ---- gradient ---------------------------------------------------------------------------------
// With a gradient to come both operators call another one, and check first, for errors name the operator.

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// key_bias and sink, which have gradients, stand among the options too. Codes are kept in place of the keys that they
// choose, which take many times as much.
struct PqAttention : torch::autograd::Function<PqAttention> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::optional<at::Tensor>& key_bias,
                               const std::optional<at::Tensor>& sink, const CodesOfKeys& codes,
                               const PqAttentionOptions& options) {
    static const auto op = find_operator<decltype(pq_attention_forward_meta)>("_pq_attention_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, logsumexp, normalizer] = op(query, key, value, codes, options);
    save_attention<5>(ctx, {query, key, value, value_or_undefined(key_bias), value_or_undefined(sink)}, options, output,
                      normalizer, {codes.query_codes, codes.key_codes});
    ctx->saved_data["k"] = codes.k;
    ctx->saved_data["is_causal"] = options.is_causal;
    ctx->saved_data["scale"] = options.scale;
    ctx->saved_data["sink_keys"] = options.sink_keys;
    ctx->saved_data["local_keys"] = options.local_keys;
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_operator<decltype(pq_attention_backward_meta)>("_pq_attention_backward");
    if (!grads[0].defined() && !grads[1].defined()) {
      return variable_list(7);
    }
    const SavedAttention saved(ctx, grads);
    const auto k = ctx->saved_data["k"].toSymInt(), sink_keys = ctx->saved_data["sink_keys"].toSymInt(),
               local_keys = ctx->saved_data["local_keys"].toSymInt();
    const PqAttentionOptions options{saved.sides(), ctx->saved_data["is_causal"].toBool(),
                                     ctx->saved_data["scale"].toOptional<double>(), sink_keys, local_keys};
    const auto [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] =
        op(saved.gradients(), saved.of_probabilities(0), saved.of_probabilities(1), k, options, saved.mask<5>());
    return {grad_query, grad_key, grad_value, grad_key_bias, grad_sink, {}, {}};
  }
};

// The output and the log-sum-exp where autograd will ask for gradients, else nothing.
variable_list recorded(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const CodesOfKeys& codes, const PqAttentionOptions& options) {
  const auto key_bias = value_or_undefined(options.key_bias), sink = value_or_undefined(options.sink);
  refuse_tangents(op, {query, key, value, key_bias, sink});
  if (!any_requires_grad({query, key, value, key_bias, sink})) {
    return {};
  }
  check_pq_attention(op, query, key, value, codes, options);
  return PqAttention::apply(query, key, value, options.key_bias, options.sink, codes, options);
}

at::Tensor pq_attention_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const CodesOfKeys& codes, const PqAttentionOptions& options) {
  if (const auto outputs = recorded("pq_attention", query, key, value, codes, options); !outputs.empty()) {
    return outputs[0];
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_pq_attention(query, key, value, codes, options);
}

std::tuple<at::Tensor, at::Tensor> pq_attention_lse_autograd(const at::Tensor& query, const at::Tensor& key,
                                                             const at::Tensor& value, const CodesOfKeys& codes,
                                                             const PqAttentionOptions& options) {
  if (const auto outputs = recorded("pq_attention_lse", query, key, value, codes, options); !outputs.empty()) {
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_pq_attention_lse(query, key, value, codes, options);
}

// ---- autocast ---------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
void register_pq_autocast(torch::Library& m) {
  m.impl("pq_attention", flattened<LoweredAttention<call_pq_attention, device, key>::call>);
  m.impl("pq_attention_lse", flattened<LoweredAttention<call_pq_attention_lse, device, key>::call>);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("pq_attention", flattened<pq_attention_meta>);
  m.impl("pq_attention_lse", flattened<pq_attention_lse_meta>);
  m.impl("_pq_attention_forward", flattened<pq_attention_forward_meta>);
  m.impl("_pq_attention_backward", flattened<pq_attention_backward_meta>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("pq_attention", flattened<pq_attention_autograd>);
  m.impl("pq_attention_lse", flattened<pq_attention_lse_autograd>);
  m.impl("_pq_attention_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_pq_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  register_pq_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>(m);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  register_pq_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor pq_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const at::Tensor& query_codes, const at::Tensor& key_codes, c10::SymInt k, bool is_causal,
                        std::optional<double> scale, c10::SymInt sink_keys, c10::SymInt local_keys,
                        const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& sink,
                        const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  return call_pq_attention(query, key, value, {query_codes, key_codes, k},
                           {{key_bias, sink, query_start, key_start}, is_causal, scale, sink_keys, local_keys});
}

std::tuple<at::Tensor, at::Tensor> pq_attention_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& query_codes,
    const at::Tensor& key_codes, c10::SymInt k, bool is_causal, std::optional<double> scale, c10::SymInt sink_keys,
    c10::SymInt local_keys, const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& sink,
    const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  return call_pq_attention_lse(query, key, value, {query_codes, key_codes, k},
                               {{key_bias, sink, query_start, key_start}, is_causal, scale, sink_keys, local_keys});
}

}  // namespace torchops
