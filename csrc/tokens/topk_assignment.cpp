#include "tokens/topk_assignment.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/checks.h"
#include "tokens/assignment.h"
#include "tokens/tokens.h"

namespace torchops {

TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "topk_assignment(Tensor scores, SymInt k, *, SymInt num_protected=0, bool fuse=False,"
      " Tensor? padding_mask=None) -> Tensor");
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

at::Tensor topk_assignment_meta(const at::Tensor& scores, c10::SymInt k, c10::SymInt num_protected, bool /*fuse*/,
                                const std::optional<at::Tensor>& padding_mask) {
  check_topk_assignment(scores, k, num_protected, padding_mask);
  return at::empty_symint(scores.sym_sizes(), scores.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, Meta, m) {
  m.impl("topk_assignment", topk_assignment_meta);
}

// Integers have no gradient.
TORCH_LIBRARY_IMPL(torchops, Autograd, m) {
  m.impl("topk_assignment", torch::CppFunction::makeFallthrough());
}

at::Tensor topk_assignment(const at::Tensor& scores, c10::SymInt k, c10::SymInt num_protected, bool fuse,
                           const std::optional<at::Tensor>& padding_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchops::topk_assignment", "")
                             .typed<decltype(topk_assignment)>();
  return op.call(scores, std::move(k), std::move(num_protected), fuse, padding_mask);
}

}  // namespace torchops
