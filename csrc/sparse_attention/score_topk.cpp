#include "sparse_attention/score_topk.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>

#include "core/checks.h"
#include "core/library.h"
#include "sparse_attention/sparse_attention.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "score_topk(Tensor query, Tensor key, SymInt k, Tensor? weights=None, Tensor? key_bias=None,"
      " Tensor? query_start=None, Tensor? key_start=None, *, bool relu=False, SymInt block_size=1,"
      " SymInt query_block=1, bool is_causal=False) -> Tensor");
}

void check_score_topk(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options) {
  const Checks check("score_topk");
  check_attention(check, query, key, at::Tensor(), options.sides());
  check.between("key's third dimension", key.sym_size(2), 0, longest);
  check.between("query's third dimension", query.sym_size(2), 0, longest);
  check.between("k", options.k, 0, longest);
  check_blocks(check, options.block_size, options.query_block);
  if (const auto& weights = options.weights) {
    check.at_least("query's number of heads", query.sym_size(1), 1);
    check.shape("weights", *weights, "[B, Hq, Lq]", query.sym_sizes().slice(0, 3));
    check.floating("weights", *weights);
    check.same_device("weights", *weights, "query", query);
  }
}

at::Tensor empty_score_choice(const at::Tensor& query, const ScoreTopkOptions& options) {
  const auto num_lists = (query.sym_size(2) + options.query_block - 1) / options.query_block;
  return at::empty_symint({query.sym_size(0), options.weights ? 1 : query.sym_size(1), num_lists, options.k},
                          query.options().dtype(at::kInt));
}

namespace {

at::Tensor score_topk_meta(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options) {
  check_score_topk(query, key, options);
  return empty_score_choice(query, options);
}

at::Tensor call_score_topk(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options) {
  static const auto op = find_operator<decltype(score_topk_meta)>("score_topk");
  return op(query, key, options);
}

// What is multiplied is lowered, as in attention.
template <c10::DeviceType device, c10::DispatchKey dispatch_key>
at::Tensor score_topk_autocast(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options) {
  const c10::impl::ExcludeDispatchKeyGuard guard(dispatch_key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return call_score_topk(at::autocast::cached_cast(dtype, query, device), at::autocast::cached_cast(dtype, key, device),
                         options);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("score_topk", flattened<score_topk_meta>);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("score_topk", torch::CppFunction::makeFallthrough());
}

TORCHOPS_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("score_topk", flattened<score_topk_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>);
}

TORCHOPS_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("score_topk", flattened<score_topk_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>);
}

at::Tensor score_topk(const at::Tensor& query, const at::Tensor& key, c10::SymInt k,
                      const std::optional<at::Tensor>& weights, bool relu, c10::SymInt block_size,
                      c10::SymInt query_block, bool is_causal, const std::optional<at::Tensor>& key_bias,
                      const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start) {
  return call_score_topk(
      query, key,
      ScoreTopkOptions{k, weights, key_bias, query_start, key_start, relu, block_size, query_block, is_causal});
}

}  // namespace torchops
