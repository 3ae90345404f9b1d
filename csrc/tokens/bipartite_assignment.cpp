#include <ATen/ops/empty.h>

#include "core/library.h"
#include "tokens/bipartite_matching.h"
#include "tokens/tokens.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "bipartite_assignment(Tensor metric, SymInt r, Tensor? padding_mask=None, *, SymInt num_protected=0)"
      " -> Tensor");
}

namespace {

at::Tensor bipartite_assignment_meta(const at::Tensor& metric, c10::SymInt r,
                                     const std::optional<at::Tensor>& padding_mask, c10::SymInt num_protected) {
  check_bipartite_matching("bipartite_assignment", metric, r, num_protected, padding_mask);
  return at::empty_symint({metric.sym_size(0), metric.sym_size(1)}, metric.options().dtype(at::kLong));
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("bipartite_assignment", bipartite_assignment_meta);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("bipartite_assignment", torch::CppFunction::makeFallthrough());
}

at::Tensor bipartite_assignment(const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected,
                                const std::optional<at::Tensor>& padding_mask) {
  static const auto op = find_operator<decltype(bipartite_assignment_meta)>("bipartite_assignment");
  return op(metric, r, padding_mask, num_protected);
}

}  // namespace torchops
