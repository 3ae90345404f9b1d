#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torchops {

// The pairs [B, R] of bipartite matching in descending similarity, R the clamped r. Dropped padding
// stands behind the merges, last positions first, with destination -1.
struct MatchedPairs {
  at::Tensor sources;
  at::Tensor destinations;
};
MatchedPairs matched_pairs(const char* op, const at::Tensor& metric, int64_t r, int64_t num_protected,
                           const std::optional<at::Tensor>& padding_mask);

}  // namespace torchops
