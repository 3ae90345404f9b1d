#include "core/checks.h"

#include "core/autograd.h"
#include "sparse_attention/arguments.h"

// What the operators refuse, with the same words on every device.

namespace torchops {
namespace {

bool equal(const c10::SymInt& one, const c10::SymInt& other) {
  return one.sym_eq(other).guard_bool(__FILE__, __LINE__);
}

void check_lists(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                 const TopkOptions& options) {
  const Checks check(op);
  const auto batch = query.sym_size(0), num_heads = query.sym_size(1), num_kv_heads = key.sym_size(1);
  check_blocks(check, options.block_size, options.query_block);
  check.rank("indices", indices, "[B, Hi, Nq, k]");
  check.integer_dtype("indices", indices);
  check.same_device("indices", indices, "query", query);
  const auto list_heads = indices.sym_size(1), num_listed = indices.sym_size(3);
  TORCH_CHECK_VALUE(equal(list_heads, 1) || equal(list_heads, num_kv_heads) || equal(list_heads, num_heads), op,
                    ": expected indices's number of heads to be 1, key's = ", num_kv_heads, " or query's = ", num_heads,
                    ", got ", list_heads);
  const auto num_lists = (query.sym_size(2) + options.query_block - 1) / options.query_block;
  check.shape("indices", indices, "[B, Hi, Nq, k]", {{batch, list_heads, num_lists, num_listed}});
  check.between("indices's last dimension", num_listed, 0, longest);
  if (const auto& bias = options.pair_bias) {
    check.rank("pair_bias", *bias, "[B, Hi or Hq, Nq, k]");
    const auto bias_heads = bias->sym_size(1);
    TORCH_CHECK_VALUE(equal(bias_heads, list_heads) || equal(bias_heads, num_heads), op,
                      ": expected pair_bias's number of heads to be indices's = ", list_heads,
                      " or query's = ", num_heads, ", got ", bias_heads);
    check.shape("pair_bias", *bias, "[B, Hi or Hq, Nq, k]", {{batch, bias_heads, num_lists, num_listed}});
    check.floating("pair_bias", *bias);
    check.same_device("pair_bias", *bias, "query", query);
  }
}

}  // namespace

void check_blocks(const Checks& check, const c10::SymInt& block_size, const c10::SymInt& query_block) {
  check.at_least("block_size", block_size, 1);
  check.between("query_block", query_block, 1, int64_t{1} << 62);
}

void check_topk_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& indices, const TopkOptions& options) {
  const Checks check(op);
  check_attention(check, query, key, value, options);
  check.between("key's third dimension", key.sym_size(2), 0, longest);
  check.between("query's third dimension", query.sym_size(2), 0, longest);
  check_lists(op, query, key, indices, options);
}

void check_topk_attention_backward(const TopkBackward& args) {
  constexpr const char* op = "_topk_attention_backward";
  const Checks check(op);
  check_attention_given(check, args, args.options, args.mask);
  if (args.mask.probabilities()) {
    check.given("indices", args.indices, "probabilities are made of it");
  }
  if (args.mask.pair_bias()) {
    check.given("pair_bias", args.options.pair_bias, "its gradient is asked for");
  }
  if (args.query && args.key && args.indices) {
    check_topk_attention(op, *args.query, *args.key, value_or_undefined(args.value), *args.indices, args.options);
  }
  check_attention_rows(check, args, args.options);
}

}  // namespace torchops
