#include "sparse_attention/pq_topk.h"

#include <ATen/ops/empty.h>

#include "core/checks.h"
#include "core/library.h"
#include "sparse_attention/arguments.h"
#include "sparse_attention/code_choice.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "pq_topk(Tensor query_codes, Tensor key_codes, SymInt k, Tensor? key_bias=None, Tensor? query_start=None,"
      " Tensor? key_start=None, *, bool is_causal=False, SymInt sink_keys=0, SymInt local_keys=0) -> Tensor");
}

void check_pq_topk(const char* op, const at::Tensor& query_codes, const at::Tensor& key_codes,
                   const PqTopkOptions& options) {
  const Checks check(op);
  check.rank("query_codes", query_codes, "[B, Hq, Lq, M]");
  check.rank("key_codes", key_codes, "[B, Hkv, Lk, M]");
  check.dtype("query_codes", query_codes, at::kByte);
  check.dtype("key_codes", key_codes, at::kByte);
  check.same_device("key_codes", key_codes, "query_codes", query_codes);
  const auto batch = query_codes.sym_size(0), num_kv_heads = key_codes.sym_size(1), num_keys = key_codes.sym_size(2);
  const auto num_subspaces = query_codes.sym_size(3);
  check.between("query_codes's last dimension", num_subspaces, 0, kernels::sparse_attention::most_subspaces);
  check.shape("key_codes", key_codes, "[B, Hkv, Lk, M]", {{batch, num_kv_heads, num_keys, num_subspaces}});
  check.at_least("key_codes's number of heads", num_kv_heads, 1);
  check.multiple_of("query_codes's number of heads", query_codes.sym_size(1), "key_codes's", num_kv_heads);
  check.between("key_codes's third dimension", num_keys, 0, longest);
  check.between("query_codes's third dimension", query_codes.sym_size(2), 0, longest);
  check.between("k", options.k, 0, longest);
  check.at_most("sink_keys", options.sink_keys, "k", options.k);
  check.at_most("local_keys", options.local_keys, "k", options.k);
  check.at_most("sink_keys + local_keys", options.sink_keys + options.local_keys, "k", options.k);
  check_key_bias(check, options.key_bias, batch, num_keys, "query_codes", query_codes);
  check_starts(check, options.query_start, options.key_start, batch, "query_codes", query_codes);
}

at::Tensor empty_choice(const at::Tensor& query_codes, const PqTopkOptions& options) {
  return at::empty_symint({query_codes.sym_size(0), query_codes.sym_size(1), query_codes.sym_size(2), options.k},
                          query_codes.options().dtype(at::kInt));
}

namespace {

at::Tensor pq_topk_meta(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options) {
  check_pq_topk("pq_topk", query_codes, key_codes, options);
  return empty_choice(query_codes, options);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("pq_topk", flattened<pq_topk_meta>);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("pq_topk", torch::CppFunction::makeFallthrough());
}

at::Tensor pq_topk(const at::Tensor& query_codes, const at::Tensor& key_codes, c10::SymInt k, bool is_causal,
                   c10::SymInt sink_keys, c10::SymInt local_keys, const std::optional<at::Tensor>& key_bias,
                   const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  static const auto op = find_operator<decltype(pq_topk_meta)>("pq_topk");
  return op(query_codes, key_codes,
            PqTopkOptions{k, key_bias, query_start, key_start, is_causal, sink_keys, local_keys});
}

}  // namespace torchops
