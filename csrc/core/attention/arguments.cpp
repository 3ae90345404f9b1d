#include "core/attention/arguments.h"

#include <ATen/ops/empty.h>

#include <utility>

namespace torchops {

void check_key_bias(const Checks& check, const std::optional<at::Tensor>& key_bias, const c10::SymInt& batch,
                    const c10::SymInt& num_keys, const char* query_name, const at::Tensor& query) {
  if (key_bias) {
    check.shape("key_bias", *key_bias, "[B, Lk]", {{batch, num_keys}});
    check.floating("key_bias", *key_bias);
    check.same_device("key_bias", *key_bias, query_name, query);
  }
}

void check_starts(const Checks& check, const std::optional<at::Tensor>& query_start,
                  const std::optional<at::Tensor>& key_start, const c10::SymInt& batch, const char* query_name,
                  const at::Tensor& query) {
  for (const auto& [name, start] : {std::pair{"query_start", &query_start}, std::pair{"key_start", &key_start}}) {
    if (*start) {
      check.shape(name, **start, "[B]", {{batch}});
      check.integer_dtype(name, **start);
      check.same_device(name, **start, query_name, query);
    }
  }
}

void check_attention(const Checks& check, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionSides& sides) {
  check.rank("query", query, "[B, Hq, Lq, D]");
  check.rank("key", key, "[B, Hkv, Lk, D]");
  if (value.defined()) {
    check.rank("value", value, "[B, Hkv, Lk, Dv]");
  }
  check.floating("query", query);
  for (const auto& [name, tensor] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    if (tensor->defined()) {
      check.same_dtype(name, *tensor, "query", query);
      check.same_device(name, *tensor, "query", query);
    }
  }
  const auto batch = query.sym_size(0), num_heads = query.sym_size(1), head_dim = query.sym_size(3);
  const auto num_kv_heads = key.sym_size(1), num_keys = key.sym_size(2);
  check.between("query's last dimension", head_dim, 1, largest_head_dim);
  check.shape("key", key, "[B, Hkv, Lk, D]", {{batch, num_kv_heads, num_keys, head_dim}});
  if (value.defined()) {
    check.shape("value", value, "[B, Hkv, Lk, Dv]", {{batch, num_kv_heads, num_keys, value.sym_size(3)}});
    check.between("value's last dimension", value.sym_size(3), 1, largest_head_dim);
  }
  check.at_least("key's number of heads", num_kv_heads, 1);
  check.multiple_of("query's number of heads", num_heads, "key's", num_kv_heads);
  check_key_bias(check, sides.key_bias, batch, num_keys, "query", query);
  if (sides.sink) {
    check.shape("sink", *sides.sink, "[Hq]", {{num_heads}});
    check.floating("sink", *sides.sink);
    check.same_device("sink", *sides.sink, "query", query);
  }
  check_starts(check, sides.query_start, sides.key_start, batch, "query", query);
}

void check_attention_rows(const Checks& check, const AttentionGradients& args, const AttentionSides& sides) {
  const at::Tensor& normalizer = args.normalizer;
  check.rank("normalizer", normalizer, "[B, Hq, Lq, 2]");
  const auto of_rows = args.query ? args.query->sym_sizes() : normalizer.sym_sizes();
  const c10::SymInt batch = of_rows[0], num_heads = of_rows[1], num_queries = of_rows[2];
  check.shape("normalizer", normalizer, "[B, Hq, Lq, 2]", {{batch, num_heads, num_queries, 2}});
  const at::Tensor* const model = args.query ? &*args.query : args.grad_output ? &*args.grad_output : nullptr;
  const auto accumulated = model == nullptr ? normalizer.scalar_type() : at::toOpMathType(model->scalar_type());
  check.dtype("normalizer", normalizer, accumulated);
  if (args.query) {
    check.same_device("normalizer", normalizer, "query", *args.query);
  }
  if (args.grad_logsumexp) {
    check.shape("grad_logsumexp", *args.grad_logsumexp, "[B, Hq, Lq]", {{batch, num_heads, num_queries}});
    check.dtype("grad_logsumexp", *args.grad_logsumexp, accumulated);
    check.same_device("grad_logsumexp", *args.grad_logsumexp, "normalizer", normalizer);
  }
  for (const auto& [name, tensor] : {std::pair{"grad_output", &args.grad_output}, std::pair{"output", &args.output}}) {
    if (*tensor) {
      check.rank(name, **tensor, "[B, Hq, Lq, Dv]");
      const auto value_dim = args.value         ? args.value->sym_size(3)
                             : args.grad_output ? args.grad_output->sym_size(3)
                                                : (*tensor)->sym_size(3);
      check.shape(name, **tensor, "[B, Hq, Lq, Dv]", {{batch, num_heads, num_queries, value_dim}});
      check.same_dtype(name, **tensor, args.query ? "query" : "grad_output", *model);
      check.same_device(name, **tensor, "normalizer", normalizer);
      check.between("value's last dimension", value_dim, 1, largest_head_dim);
    }
  }
  if (sides.sink) {
    check.shape("sink", *sides.sink, "[Hq]", {{num_heads}});
    check.floating("sink", *sides.sink);
    check.same_device("sink", *sides.sink, "normalizer", normalizer);
  }
}

// [B, H, L, last_dim], with heads inside of positions where the model's are.
at::Tensor empty_with_layout_of(const at::Tensor& model, const c10::SymInt& last_dim) {
  const auto batch = model.sym_size(0), heads = model.sym_size(1), length = model.sym_size(2);
  if (TORCH_GUARD_OR_FALSE(model.sym_stride(1).sym_lt(model.sym_stride(2)))) {
    return at::empty_symint({batch, length, heads, last_dim}, model.options()).transpose(1, 2);
  }
  return at::empty_symint({batch, heads, length, last_dim}, model.options());
}

at::Tensor empty_logsumexp(const at::Tensor& query) {
  return at::empty_symint(query.sym_sizes().slice(0, 3), query.options().dtype(at::toOpMathType(query.scalar_type())));
}

at::Tensor empty_normalizer(const at::Tensor& query) {
  return at::empty_symint({query.sym_size(0), query.sym_size(1), query.sym_size(2), 2},
                          query.options().dtype(at::toOpMathType(query.scalar_type())));
}

at::Tensor empty_side(bool wanted, const std::optional<at::Tensor>& of) {
  return wanted ? at::empty_symint(of->sym_sizes(), of->options()) : at::Tensor();
}

}  // namespace torchops
