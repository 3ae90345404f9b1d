#include "tokens/topk_assignment.h"

#include <ATen/ops/empty.h>

#include "core/checks.h"
#include "core/library.h"
#include "tokens/assignment.h"
#include "tokens/tokens.h"

namespace torchops {

TORCHOPS_LIBRARY(m) {
  m.def(
      "topk_assignment(Tensor scores, SymInt k, Tensor? padding_mask=None, *, SymInt num_protected=0, bool fuse=False)"
      " -> Tensor");
}

void check_topk_assignment(const at::Tensor& scores, const c10::SymInt& k, const c10::SymInt& num_protected,
                           const std::optional<at::Tensor>& padding_mask) {
  const Checks check("topk_assignment");
  check.rank("scores", scores, "[B, N]");
  check.floating("scores", scores);
  check.at_least("k", k, 0);
  check.at_most("N", scores.sym_size(1), "the largest 32-bit integer", largest_num_tokens);
  check.at_most("num_protected", num_protected, "N", scores.sym_size(1));
  if (padding_mask) {
    check.shape("padding_mask", *padding_mask, "[B, N]", scores.sym_sizes());
    check.dtype("padding_mask", *padding_mask, at::kBool);
    check.same_device("padding_mask", *padding_mask, "scores", scores);
  }
}

namespace {

at::Tensor topk_assignment_meta(const at::Tensor& scores, c10::SymInt k, const std::optional<at::Tensor>& padding_mask,
                                c10::SymInt num_protected, bool /*fuse*/) {
  check_topk_assignment(scores, k, num_protected, padding_mask);
  return at::empty_symint(scores.sym_sizes(), scores.options().dtype(at::kLong));
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("topk_assignment", topk_assignment_meta);
}

// Integers have no gradient.
TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("topk_assignment", torch::CppFunction::makeFallthrough());
}

at::Tensor topk_assignment(const at::Tensor& scores, c10::SymInt k, c10::SymInt num_protected, bool fuse,
                           const std::optional<at::Tensor>& padding_mask) {
  static const auto op = find_operator<decltype(topk_assignment_meta)>("topk_assignment");
  return op(scores, k, padding_mask, num_protected, fuse);
}

}  // namespace torchops
