#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

namespace torchops {

// Bounds on the tokens of a row, which kernels count in 32 bits, and on the groups, so that sizes computed from
// their number cannot overflow. There may be more groups than tokens: groups may be empty.
inline constexpr int64_t largest_num_tokens = std::numeric_limits<int32_t>::max();
inline constexpr int64_t largest_num_groups = std::numeric_limits<int32_t>::max();

// The tokens of each group: group m of row b has members[b, offsets[b, m]] ... members[b, offsets[b, m + 1] - 1],
// in ascending order.
struct TokensOfGroups {
  at::Tensor offsets;  // [B, M + 1]
  at::Tensor members;  // [B, N]
};

}  // namespace torchops
