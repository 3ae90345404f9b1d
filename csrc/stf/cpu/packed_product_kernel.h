#pragma once

#include "core/cpu/level.h"
#include "stf/packed_factor.h"

// Products with the packed sparse factor: the values of a column are spread over 16 rows, and added up times a
// number of each token.

namespace torchops::kernels::stf {

// output[t, r] = bias[r] + sum over columns of the packed factor's row r times atoms[b, t, column].
template <typename T>
struct PackedAtomsToRows {
  PackedFactor<T> factor;
  const accumulate_t<T>* atoms;  // [blocks, T, K]
  const T* bias;                 // [rows], or null
  T* output;                     // [T, rows]
  int64_t num_tokens;
};

// output[b, t, k] = sum over rows of the packed factor's column k times rows[t, r]. The rows are cut into parts,
// whose sums are added up in ascending order.
template <typename T>
struct PackedRowsToAtoms {
  PackedFactor<T> factor;
  const accumulate_t<T>* rows;  // [T, groups * 16], zeros behind the last row
  accumulate_t<T>* sums;        // [parts][blocks, T, K]
  int64_t num_tokens;

  static constexpr int64_t groups_of_part = 32;
  constexpr int64_t num_parts() const { return (factor.num_groups() + groups_of_part - 1) / groups_of_part; }
};

// The factor with its zeros.
template <typename T>
struct PackedCode {
  PackedFactor<T> factor;
  T* code;  // [rows, blocks, K]
};

#define TORCHOPS_DECLARE(level)                                                                           \
  namespace level {                                                                                       \
  template <typename T>                                                                                   \
  int64_t packed_scratch_bytes(const PackedFactor<T>& factor);                                            \
  /* Units are groups of rows. False if a mask does not have 16 * nnz bits. */                            \
  template <typename T>                                                                                   \
  bool packed_atoms_to_rows(const PackedAtomsToRows<T>& args, void* scratch, int64_t begin, int64_t end); \
  template <typename T>                                                                                   \
  bool packed_code(const PackedCode<T>& args, void* scratch, int64_t begin, int64_t end);                 \
  /* Units are parts. */                                                                                  \
  template <typename T>                                                                                   \
  bool packed_rows_to_atoms(const PackedRowsToAtoms<T>& args, void* scratch, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::stf
