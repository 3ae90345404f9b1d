#include <ATen/ops/empty.h>

#include "core/library.h"
#include "tokens/bipartite_matching.h"
#include "tokens/tokens.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "bipartite_pairs(Tensor metric, SymInt r, Tensor? padding_mask=None, *, SymInt num_protected=0)"
      " -> (Tensor sources, Tensor destinations)");
}

namespace {

std::tuple<at::Tensor, at::Tensor> bipartite_pairs_meta(const at::Tensor& metric, c10::SymInt r,
                                                        const std::optional<at::Tensor>& padding_mask,
                                                        c10::SymInt num_protected) {
  check_bipartite_matching("bipartite_pairs", metric, r, num_protected, padding_mask);
  const c10::SymInt shape[] = {metric.sym_size(0), clamped_r(metric.sym_size(1), r, num_protected)};
  const auto options = metric.options().dtype(at::kLong);
  return {at::empty_symint(shape, options), at::empty_symint(shape, options)};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("bipartite_pairs", bipartite_pairs_meta);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("bipartite_pairs", torch::CppFunction::makeFallthrough());
}

std::tuple<at::Tensor, at::Tensor> bipartite_pairs(const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected,
                                                   const std::optional<at::Tensor>& padding_mask) {
  static const auto op = find_operator<decltype(bipartite_pairs_meta)>("bipartite_pairs");
  return op(metric, r, padding_mask, num_protected);
}

}  // namespace torchops
