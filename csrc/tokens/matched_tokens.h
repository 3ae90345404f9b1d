#pragma once

#include <cstdint>

namespace torchops::kernels::tokens {

// From each source's best destination to the matching: the sources of highest similarity merge, the
// lower position first among equals; where there are too few, the last padding tokens are dropped.
struct MatchedTokens {
  const int32_t* similarity;   // [B, S]
  const int64_t* destination;  // [B, S]: -1 for a source that cannot merge
  const bool* padding;         // [B, N], or null for none
  int64_t num_tokens;          // N
  int64_t num_sources;         // S
  int64_t first_source;
  int64_t num_removed;  // R
};

}  // namespace torchops::kernels::tokens
