#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace torchops::kernels::sparse_attention {

// Codewords are compared so many at a time.
inline constexpr int64_t codeword_group = 16;

// The codeword nearest to each part of a row, by the sum of absolute differences, taken in the order of channels: these
// are additions alone, so that every device comes to the same sums.
template <typename T>
struct NearestCodeword {
  const T* input;                    // [R, M S]
  const accumulate_t<T>* codewords;  // [M, S, E]; behind the last codeword of a subspace infinities
  uint8_t* codes;                    // [R, M]
  int64_t num_rows;                  // R
  int64_t num_subspaces;             // M
  int64_t subspace;                  // S
  int64_t num_codewords;             // E, a multiple of codeword_group

  constexpr const T* part(int64_t row, int64_t m) const { return input + (row * num_subspaces + m) * subspace; }
  constexpr const accumulate_t<T>* codebook(int64_t m) const { return codewords + m * subspace * num_codewords; }
  constexpr uint8_t& code(int64_t row, int64_t m) const { return codes[row * num_subspaces + m]; }
};

}  // namespace torchops::kernels::sparse_attention
