#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "tokens/matched_tokens.h"

namespace torchops {

// Each source's best destination on the current device, and what the kernels behind it take.
struct BestDestinations {
  at::Tensor similarity;   // [B, S]
  at::Tensor destination;  // [B, S]
  std::optional<at::Tensor> padding;
  kernels::tokens::MatchedTokens args;
};
BestDestinations best_destinations_cuda(const at::Tensor& metric, int64_t r, int64_t num_protected,
                                        const std::optional<at::Tensor>& padding_mask);

}  // namespace torchops
