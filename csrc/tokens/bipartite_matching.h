#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// What bipartite_assignment and bipartite_pairs share on every device.

namespace torchops {

// r clamped to what bipartite matching can remove: half of the tokens behind the protected ones.
c10::SymInt clamped_r(const c10::SymInt& num_tokens, const c10::SymInt& r, const c10::SymInt& num_protected);

void check_bipartite_matching(const char* op, const at::Tensor& metric, const c10::SymInt& r,
                              const c10::SymInt& num_protected, const std::optional<at::Tensor>& padding_mask);

}  // namespace torchops
