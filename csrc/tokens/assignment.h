#pragma once

#include <cstdint>
#include <limits>

namespace torchops {

// Bound on the number of groups, so that sizes computed from it cannot overflow. The number of tokens
// is no bound: groups may be empty.
inline constexpr int64_t largest_num_groups = std::numeric_limits<int32_t>::max();

}  // namespace torchops
