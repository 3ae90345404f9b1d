#pragma once

#include "core/rows.h"
#include "core/scalar.h"

namespace torchops::kernels::tokens {

// Cosine similarities are those of rows of integers, so that sums of products are exact in any order and every level
// and device finds the same. A row x becomes integers like this:
//   y = x * 2^s as float, with the even s that brings the largest magnitude to at most 2^8 and more than 2^6,
//   q = y * 2^e rounded, with the largest e that keeps the length of q below 2^15 (integer_scale).
// The similarity of rows q and p is float(<q, p>) * inverse_length(q) * inverse_length(p), the source's first.
// Rows with a NaN or an infinity are zeros with the inverse length NaN, rows of zeros have 0.
inline constexpr int scaled_exponent = 8;

// s / 2 for a row whose largest magnitude is in [2^(exponent - 1), 2^exponent). Applied twice, for 2^s itself can be
// out of range.
constexpr int half_shift(int exponent) {
  const int shift = scaled_exponent - exponent;
  return (shift - (shift & 1)) / 2;
}

// 2^e. `bound` is 4 * sum of t (t + 1) + K with t = |y| rounded: at least four times y's squared length, and exact.
constexpr double integer_scale(double bound) {
  constexpr double limit = 65534.0 * 65534.0;
  double scale = 512;
  while (bound * scale * scale > limit) {
    scale /= 2;
  }
  return scale;
}

// Similarities are compared after rounding to multiples of 1 / similarity_steps, so that tokens
// that are equal up to noise tie, and position decides.
inline constexpr float similarity_steps = 65536;
// Below every similarity: that of a row with a NaN or an infinity in it.
inline constexpr int32_t nan_similarity = -131072;
// Of a source that has met no destination.
inline constexpr int32_t no_similarity = nan_similarity - 1;

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
