#pragma once

#include <cstdint>

#include "core/scalar.h"

// What the kernels of every device take. A weight is M[r, block b] = sum over e of
// values[r, b, e] * basis[b, indices[r, b, e], :], and a product with it passes the atoms of the basis:
// on one side of the sparse factor are rows [T, rows] of tokens, on the other atoms [blocks, T, K].

namespace torchops::kernels::stf {

template <typename T>
struct SparseFactor {
  const T* values;      // [rows, blocks, nnz]
  const void* indices;  // [rows, blocks, nnz]: uint8 or int16, 0..K-1
  bool byte_indices;
  int64_t num_rows;
  int64_t num_blocks;
  int64_t nnz;
  int64_t basis_size;  // K

  // Nonzeros of a row, in all blocks.
  constexpr int64_t row_size() const { return num_blocks * nnz; }

  // A negative index becomes one that is too large.
  constexpr int64_t index(int64_t at) const {
    return byte_indices ? int64_t{static_cast<const uint8_t*>(indices)[at]}
                        : int64_t{static_cast<const uint16_t*>(indices)[at]};
  }
};

}  // namespace torchops::kernels::stf
