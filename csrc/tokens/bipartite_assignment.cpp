#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "tokens/bipartite_matching.h"
#include "tokens/tokens.h"

namespace torchops {

TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "bipartite_assignment(Tensor metric, SymInt r, *, SymInt num_protected=0, Tensor? padding_mask=None)"
      " -> Tensor");
}

namespace {

at::Tensor bipartite_assignment_meta(const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected,
                                     const std::optional<at::Tensor>& padding_mask) {
  check_bipartite_matching("bipartite_assignment", metric, r, num_protected, padding_mask);
  return at::empty_symint({metric.sym_size(0), metric.sym_size(1)}, metric.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, Meta, m) {
  m.impl("bipartite_assignment", bipartite_assignment_meta);
}

// Integers have no gradient.
TORCH_LIBRARY_IMPL(torchops, Autograd, m) {
  m.impl("bipartite_assignment", torch::CppFunction::makeFallthrough());
}

at::Tensor bipartite_assignment(const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected,
                                const std::optional<at::Tensor>& padding_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchops::bipartite_assignment", "")
                             .typed<decltype(bipartite_assignment)>();
  return op.call(metric, std::move(r), std::move(num_protected), padding_mask);
}

}  // namespace torchops
