#include "tokens/bipartite_matching.h"

#include "core/checks.h"
#include "tokens/assignment.h"
#include "tokens/tokens.h"

namespace torchops {

c10::SymInt clamped_r(const c10::SymInt& num_tokens, const c10::SymInt& r, const c10::SymInt& num_protected) {
  return r.min((num_tokens - num_protected) / 2);
}

c10::SymInt num_groups(c10::SymInt num_tokens, c10::SymInt r, c10::SymInt num_protected) {
  const Checks check("num_groups");
  check.at_least("num_tokens", num_tokens, 0);
  check.at_least("r", r, 0);
  check.at_most("num_protected", num_protected, "num_tokens", num_tokens);
  return num_tokens - clamped_r(num_tokens, r, num_protected);
}

void check_bipartite_matching(const char* op, const at::Tensor& metric, const c10::SymInt& r,
                              const c10::SymInt& num_protected, const std::optional<at::Tensor>& padding_mask) {
  const Checks check(op);
  check.rank("metric", metric, "[B, N, K]");
  check.floating("metric", metric);
  check.at_least("r", r, 0);
  check.at_most("N", metric.sym_size(1), "the largest 32-bit integer", largest_num_tokens);
  check.at_most("num_protected", num_protected, "N", metric.sym_size(1));
  if (padding_mask) {
    check.shape("padding_mask", *padding_mask, "[B, N]", {metric.sym_size(0), metric.sym_size(1)});
    check.dtype("padding_mask", *padding_mask, at::kBool);
    check.same_device("padding_mask", *padding_mask, "metric", metric);
  }
}

}  // namespace torchops
