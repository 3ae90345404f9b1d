#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace torchops::kernels::sparse_attention {

// Codewords are compared so many at a time.
inline constexpr int64_t codeword_group = 16;
inline constexpr int64_t most_codewords = 256;

// Rows that are cut into parts, and the codewords of each part. Distances are sums of absolute differences, taken in
// the order of channels: these are additions alone, so that every device comes to the same sums.
template <typename T>
struct Parts {
  const T* input;                    // [R, M S]
  const accumulate_t<T>* codewords;  // [M, S, E padded]; behind the last codeword of a subspace copies of it
  int64_t num_rows;                  // R
  int64_t num_subspaces;             // M
  int64_t subspace;                  // S
  int64_t num_codewords;             // E

  // E padded, a multiple of codeword_group.
  constexpr int64_t padded() const { return (num_codewords + codeword_group - 1) / codeword_group * codeword_group; }
  constexpr int64_t offset(int64_t row, int64_t m) const { return (row * num_subspaces + m) * subspace; }
  constexpr const T* part(int64_t row, int64_t m) const { return input + offset(row, m); }
  constexpr const accumulate_t<T>* codebook(int64_t m) const { return codewords + m * subspace * padded(); }
};

}  // namespace torchops::kernels::sparse_attention
