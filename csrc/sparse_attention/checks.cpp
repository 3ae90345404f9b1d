#include "core/checks.h"

#include "sparse_attention/arguments.h"

// What the operators refuse, with the same words on every device.

namespace torchops {
namespace {

// Kernels count the keys of a sequence, and the entries of a list, in 32 bits.
constexpr int64_t longest = int64_t{1} << 30;

bool equal(const c10::SymInt& one, const c10::SymInt& other) {
  return one.sym_eq(other).guard_bool(__FILE__, __LINE__);
}

void check_lists(const char* op, const TopkInputs& inputs) {
  const Checks check(op);
  const at::Tensor& indices = inputs.indices;
  const auto num_heads = inputs.query.sym_size(1), num_kv_heads = inputs.key.sym_size(1);
  const c10::SymInt& query_block = inputs.options.query_block;
  check.at_least("block_size", inputs.options.block_size, 1);
  check.between("query_block", query_block, 1, int64_t{1} << 62);
  check.rank("indices", indices, "[B, Hi, Nq, k]");
  check.integer_dtype("indices", indices);
  check.same_device("indices", indices, "query", inputs.query);
  const auto list_heads = indices.sym_size(1), num_listed = indices.sym_size(3);
  TORCH_CHECK_VALUE(equal(list_heads, 1) || equal(list_heads, num_kv_heads) || equal(list_heads, num_heads), op,
                    ": expected indices's number of heads to be 1, key's = ", num_kv_heads, " or query's = ", num_heads,
                    ", got ", list_heads);
  const auto num_queries = inputs.query.sym_size(2);
  const auto num_lists = (num_queries + query_block - 1) / query_block;
  check.shape("indices", indices, "[B, Hi, Nq, k]", {{inputs.query.sym_size(0), list_heads, num_lists, num_listed}});
  check.between("indices's last dimension", num_listed, 0, longest);
  if (const auto& bias = inputs.options.pair_bias) {
    check.rank("pair_bias", *bias, "[B, Hi or Hq, Nq, k]");
    const auto bias_heads = bias->sym_size(1);
    TORCH_CHECK_VALUE(equal(bias_heads, list_heads) || equal(bias_heads, num_heads), op,
                      ": expected pair_bias's number of heads to be indices's = ", list_heads,
                      " or query's = ", num_heads, ", got ", bias_heads);
    check.shape("pair_bias", *bias, "[B, Hi or Hq, Nq, k]",
                {{inputs.query.sym_size(0), bias_heads, num_lists, num_listed}});
    check.floating("pair_bias", *bias);
    check.same_device("pair_bias", *bias, "query", inputs.query);
  }
}

}  // namespace

void check_topk_attention(const char* op, const TopkInputs& inputs) {
  const Checks check(op);
  const at::Tensor &query = inputs.query, &key = inputs.key, &value = inputs.value;
  const TopkOptions& options = inputs.options;
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
  check.between("key's third dimension", num_keys, 0, longest);
  check.between("query's third dimension", query.sym_size(2), 0, longest);
  check_lists(op, inputs);
  if (options.key_bias) {
    check.shape("key_bias", *options.key_bias, "[B, Lk]", {{batch, num_keys}});
    check.floating("key_bias", *options.key_bias);
    check.same_device("key_bias", *options.key_bias, "query", query);
  }
  if (options.sink) {
    check.shape("sink", *options.sink, "[Hq]", {{num_heads}});
    check.floating("sink", *options.sink);
    check.same_device("sink", *options.sink, "query", query);
  }
  for (const auto& [name, start] :
       {std::pair{"query_start", &options.query_start}, std::pair{"key_start", &options.key_start}}) {
    if (*start) {
      check.shape(name, **start, "[B]", {{batch}});
      check.integer_dtype(name, **start);
      check.same_device(name, **start, "query", query);
    }
  }
}

void check_topk_attention_backward(const TopkBackward& args) {
  constexpr const char* op = "_topk_attention_backward";
  const Checks check(op);
  const TopkMask& mask = args.mask;
  const at::Tensor& normalizer = args.normalizer;
  if (mask.probabilities()) {
    check.given("query", args.query, "probabilities are made of it");
    check.given("key", args.key, "probabilities are made of it");
    check.given("indices", args.indices, "probabilities are made of it");
  }
  if (args.query && args.key && args.indices) {
    check_topk_attention(op, {*args.query, *args.key, value_or_undefined(args.value), *args.indices, args.options});
  }
  if (mask.value()) {
    check.given("grad_output", args.grad_output, "value's gradient is asked for");
  }
  if (args.grad_output && mask.scores()) {
    check.given("value", args.value, "gradients to scores are made of it");
  }
  if (args.grad_output && mask.delta()) {
    check.given("output", args.output, "the gradients asked for are made of it");
  }
  for (const auto& [name, wanted, tensor] : {std::tuple{"key_bias", mask.key_bias(), &args.options.key_bias},
                                             std::tuple{"pair_bias", mask.pair_bias(), &args.options.pair_bias},
                                             std::tuple{"sink", mask.sink(), &args.options.sink}}) {
    if (wanted) {
      check.given(name, *tensor, "its gradient is asked for");
    }
  }

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
  if (args.options.sink) {
    check.shape("sink", *args.options.sink, "[Hq]", {{num_heads}});
    check.floating("sink", *args.options.sink);
    check.same_device("sink", *args.options.sink, "normalizer", normalizer);
  }
}

}  // namespace torchops
