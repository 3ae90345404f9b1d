#include "sparse_attention/topk_scores.h"

#include <ATen/ops/empty.h>

#include "core/attention/autograd.h"
#include "core/forward_mode.h"
#include "core/library.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "topk_scores(Tensor query, Tensor key, Tensor indices, Tensor? query_start=None, Tensor? key_start=None, *,"
      " SymInt block_size=1, SymInt query_block=1, bool is_causal=False, float? scale=None) -> Tensor");
  m.def(
      "_topk_scores_backward(Tensor grad, Tensor? query, Tensor? key, Tensor indices, Tensor? query_start,"
      " Tensor? key_start, *, SymInt block_size, SymInt query_block, bool is_causal, float? scale, SymInt group_size,"
      " SymInt num_keys, bool[2] output_mask) -> (Tensor grad_query, Tensor grad_key)");
}

// ---- arguments --------------------------------------------------------------------------------

namespace {

const std::optional<at::Tensor> absent;

// Those of an attention over the same lists, which adds nothing to scores.
TopkOptions attention_options(const ScoreOptions& options) {
  return {{absent, absent, options.query_start, options.key_start},
          absent,
          options.block_size,
          options.query_block,
          options.is_causal,
          options.scale};
}

}  // namespace

void check_topk_scores(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                       const ScoreOptions& options) {
  const Checks check(op);
  check_topk_attention(op, query, key, {}, indices, attention_options(options));
  check.between("block_size", options.block_size, 1, longest);
  check.between("indices's last dimension times block_size", indices.sym_size(3) * options.block_size, 0, longest);
}

at::Tensor empty_scores(const at::Tensor& query, const at::Tensor& indices, const ScoreOptions& options) {
  return at::empty_symint(
      {query.sym_size(0), query.sym_size(1), query.sym_size(2), indices.sym_size(3) * options.block_size},
      query.options().dtype(at::toOpMathType(query.scalar_type())));
}

ScoresGradients empty_score_gradients(const ScoresBackward& args) {
  constexpr const char* op = "_topk_scores_backward";
  const Checks check(op);
  const at::Tensor& grad = args.grad;
  check.rank("grad", grad, "[B, Hq, Lq, k block_size]");
  check.at_least("group_size", args.group_size, 1);
  check.multiple_of("grad's number of heads", grad.sym_size(1), "group_size", args.group_size);
  check.between("num_keys", args.num_keys, 0, longest);
  at::Tensor grad_query, grad_key;
  if (args.output_mask[0]) {
    check.given("key", args.key, "query's gradient is asked for");
    check.rank("key", *args.key, "[B, Hkv, Lk, D]");
    grad_query = at::empty_symint({grad.sym_size(0), grad.sym_size(1), grad.sym_size(2), args.key->sym_size(3)},
                                  args.key->options());
  }
  if (args.output_mask[1]) {
    check.given("query", args.query, "key's gradient is asked for");
    check.rank("query", *args.query, "[B, Hq, Lq, D]");
    const auto num_kv_heads = args.key ? args.key->sym_size(1) : grad.sym_size(1) / args.group_size;
    grad_key = at::empty_symint({grad.sym_size(0), num_kv_heads, args.num_keys, args.query->sym_size(3)},
                                args.query->options());
  }
  if (grad_query.defined() || grad_key.defined()) {
    const at::Tensor& query = args.query ? *args.query : grad_query;
    const at::Tensor& key = args.key ? *args.key : grad_key;
    check_topk_scores(op, query, key, args.indices, args.options);
    if (grad.sym_size(1) != 0) {
      check.equal("grad's heads / group_size", grad.sym_size(1) / args.group_size, "key's number of heads",
                  key.sym_size(1));
    }
    check.equal("num_keys", args.num_keys, "key's third dimension", key.sym_size(2));
    check.shape("grad", grad, "[B, Hq, Lq, k block_size]",
                {{query.sym_size(0), query.sym_size(1), query.sym_size(2),
                  args.indices.sym_size(3) * args.options.block_size}});
    check.dtype("grad", grad, at::toOpMathType(query.scalar_type()));
    check.same_device("grad", grad, args.query ? "query" : "key", query);
  }
  return {grad_query, grad_key};
}

ListedScores::ListedScores(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                           const ScoreOptions& options)
    : TopkTensors(query, key, {}, 0, indices, attention_options(options)) {
}

// ---- shapes -----------------------------------------------------------------------------------

namespace {

at::Tensor topk_scores_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                            const ScoreOptions& options) {
  check_topk_scores("topk_scores", query, key, indices, options);
  return empty_scores(query, indices, options);
}

// ---- gradient ---------------------------------------------------------------------------------

at::Tensor call_topk_scores(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                            const ScoreOptions& options) {
  static const auto op = find_operator<decltype(topk_scores_meta)>("topk_scores");
  return op(query, key, indices, options);
}

struct TopkScores : torch::autograd::Function<TopkScores> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& indices, const ScoreOptions& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto scores = call_topk_scores(query, key, indices, options);
    const auto needed = [](bool is_needed, const at::Tensor& tensor) { return is_needed ? tensor : at::Tensor(); };
    // Without queries' heads there is no group, and keys say how many of theirs there are.
    const bool has_groups = query.sym_size(1) != 0;
    ctx->save_for_backward({needed(key.requires_grad(), query), needed(query.requires_grad() || !has_groups, key),
                            indices, value_or_undefined(options.query_start), value_or_undefined(options.key_start)});
    ctx->saved_data["block_size"] = options.block_size;
    ctx->saved_data["query_block"] = options.query_block;
    ctx->saved_data["is_causal"] = options.is_causal;
    ctx->saved_data["scale"] = options.scale;
    ctx->saved_data["group_size"] = has_groups ? query.sym_size(1) / key.sym_size(1) : 1;
    ctx->saved_data["num_keys"] = key.sym_size(2);
    return scores;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op = find_operator<decltype(empty_score_gradients)>("_topk_scores_backward");
    const auto saved = ctx->get_saved_variables();
    const auto query = optional_tensor(saved[0]), key = optional_tensor(saved[1]),
               query_start = optional_tensor(saved[3]), key_start = optional_tensor(saved[4]);
    const auto number = [&](const char* name) { return ctx->saved_data[name].toSymInt(); };
    const auto block_size = number("block_size"), query_block = number("query_block"),
               group_size = number("group_size"), num_keys = number("num_keys");
    const ScoreOptions options{query_start,
                               key_start,
                               block_size,
                               query_block,
                               ctx->saved_data["is_causal"].toBool(),
                               ctx->saved_data["scale"].toOptional<double>()};
    const auto [grad_query, grad_key] = op(ScoresBackward{grads[0],
                                                          query,
                                                          key,
                                                          saved[2],
                                                          options,
                                                          group_size,
                                                          num_keys,
                                                          {ctx->needs_input_grad(0), ctx->needs_input_grad(1)}});
    return {grad_query, grad_key, {}, {}};
  }
};

at::Tensor topk_scores_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                                const ScoreOptions& options) {
  refuse_tangents("topk_scores", {query, key});
  if (any_requires_grad({query, key})) {
    return TopkScores::apply(query, key, indices, options);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_topk_scores(query, key, indices, options);
}

// ---- autocast ---------------------------------------------------------------------------------
// What is multiplied is lowered, as by topk_attention.

template <c10::DeviceType device, c10::DispatchKey dispatch_key>
at::Tensor topk_scores_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                                const ScoreOptions& options) {
  const c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return call_topk_scores(at::autocast::cached_cast(dtype, query, device),
                          at::autocast::cached_cast(dtype, key, device), indices, options);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("topk_scores", flattened<topk_scores_meta>);
  m.impl("_topk_scores_backward", flattened<empty_score_gradients>);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("topk_scores", flattened<topk_scores_autograd>);
  m.impl("_topk_scores_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("topk_scores", flattened<topk_scores_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("topk_scores", flattened<topk_scores_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
}

// ---- C++ API ----------------------------------------------------------------------------------

at::Tensor topk_scores(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                       c10::SymInt block_size, c10::SymInt query_block, bool is_causal, std::optional<double> scale,
                       const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  return call_topk_scores(query, key, indices, {query_start, key_start, block_size, query_block, is_causal, scale});
}

}  // namespace torchops
