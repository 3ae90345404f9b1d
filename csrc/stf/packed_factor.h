#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace torchops::kernels::stf {

inline constexpr int64_t rows_per_group = 16;

// The sparse factor as inference keeps it: rows in groups of 16, a mask for each column of a group, and the
// values in the order of columns and then rows. Rows behind the last are zeros.
template <typename T>
struct PackedFactor {
  const T* values;       // [groups, blocks, 16 * nnz]
  const uint16_t* mask;  // [groups, blocks, K]: bit r says that row r of the group has the column
  int64_t num_rows;
  int64_t num_blocks;
  int64_t nnz;
  int64_t basis_size;  // K

  // Nonzeros of a row, in all blocks.
  constexpr int64_t row_size() const { return num_blocks * nnz; }
  constexpr int64_t num_groups() const { return (num_rows + rows_per_group - 1) / rows_per_group; }
  constexpr int64_t rows_in_group(int64_t group) const {
    const int64_t left = num_rows - group * rows_per_group;
    return left < rows_per_group ? left : rows_per_group;
  }
};

}  // namespace torchops::kernels::stf
