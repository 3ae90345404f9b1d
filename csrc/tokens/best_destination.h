#pragma once

#include "core/rows.h"
#include "core/scalar.h"

namespace torchops::kernels::tokens {

// Cosine similarities are compared after rounding to multiples of 1 / similarity_steps, so that tokens
// that are equal up to rounding noise tie, and position decides.
inline constexpr float similarity_steps = 65536;
// Below every similarity: that of a row with a NaN or an infinity in it.
inline constexpr int32_t nan_similarity = -131072;

// Sources per unit of work.
inline constexpr int64_t source_block = 64;

// Sources are the even positions from num_protected on, destinations the odd ones.
constexpr int64_t first_source(int64_t num_protected) {
  return num_protected + num_protected % 2;
}
constexpr int64_t num_sources(int64_t num_tokens, int64_t num_protected) {
  const int64_t first = first_source(num_protected);
  return first < num_tokens ? (num_tokens - first + 1) / 2 : 0;
}

// For every source token the destination token of highest cosine similarity, the lowest position
// among equals. Padding is neither source nor destination. A source that is padding, or finds no destination, gets
// destination -1.
template <typename T>
struct BestDestination {
  Rows<const T> metric;  // [B, N, K]
  const bool* padding;   // [B, N], or null for none
  int32_t* similarity;   // [B, S]: in steps of 1 / similarity_steps
  int64_t* destination;  // [B, S]: positions
  int64_t num_tokens;    // N
  int64_t num_features;  // K
  int64_t num_protected;
  int64_t num_sources;  // S; source s stands at position first_source() + 2 s

  constexpr int64_t first_source() const { return tokens::first_source(num_protected); }
  constexpr int64_t first_destination() const { return num_protected + 1 - num_protected % 2; }
  constexpr int64_t blocks_per_row() const { return (num_sources + source_block - 1) / source_block; }
};

}  // namespace torchops::kernels::tokens
