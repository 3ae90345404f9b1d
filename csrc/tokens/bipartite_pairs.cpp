#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "tokens/bipartite_matching.h"
#include "tokens/tokens.h"

namespace torchops {

TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "bipartite_pairs(Tensor metric, SymInt r, *, SymInt num_protected=0, Tensor? padding_mask=None)"
      " -> (Tensor sources, Tensor destinations)");
}

namespace {

std::tuple<at::Tensor, at::Tensor> bipartite_pairs_meta(const at::Tensor& metric, c10::SymInt r,
                                                        c10::SymInt num_protected,
                                                        const std::optional<at::Tensor>& padding_mask) {
  check_bipartite_matching("bipartite_pairs", metric, r, num_protected, padding_mask);
  const c10::SymInt shape[] = {metric.sym_size(0), clamped_r(metric.sym_size(1), r, num_protected)};
  const auto options = metric.options().dtype(at::kLong);
  return {at::empty_symint(shape, options), at::empty_symint(shape, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, Meta, m) {
  m.impl("bipartite_pairs", bipartite_pairs_meta);
}

// Integers have no gradient.
TORCH_LIBRARY_IMPL(torchops, Autograd, m) {
  m.impl("bipartite_pairs", torch::CppFunction::makeFallthrough());
}

std::tuple<at::Tensor, at::Tensor> bipartite_pairs(const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected,
                                                   const std::optional<at::Tensor>& padding_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchops::bipartite_pairs", "")
                             .typed<decltype(bipartite_pairs)>();
  return op.call(metric, std::move(r), std::move(num_protected), padding_mask);
}

}  // namespace torchops
