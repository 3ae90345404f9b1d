#pragma once

#include <cstdint>

#include "stf/cuda/layout.h"
#include "stf/packed_factor.h"
#include "stf/sparse_factor.h"

// What the host layers have to know of the kernels, and how they start them.

namespace torchops::kernels::stf::cuda {

// ---- the factor in another form -----------------------------------------------------------------

// Of every row and block of the latent, the nnz entries that are largest in magnitude, the lower index among
// equals, in ascending order of indices.
template <typename T>
struct Select {
  const T* latent;  // [rows, blocks, K]
  T* values;        // [rows, blocks, nnz]
  void* indices;    // [rows, blocks, nnz], uint8 or int16
  bool byte_indices;
  int32_t basis_size;  // K
  int32_t nnz;         // at least 1
};

template <typename T>
void launch_select(const Select<T>& args, int64_t num_rows /* of all blocks */);

template <typename T>
struct PackFactor {
  SparseFactor<T> factor;  // whose indices increase in every row and block
  T* values;               // [groups, blocks, 16 * nnz]
  uint16_t* mask;          // [groups, blocks, K]
};

template <typename T>
void launch_pack_factor(const PackFactor<T>& args);

// dense [rows, blocks, K]
template <typename T>
void launch_expand_factor(const SparseFactor<T>& factor, T* dense);

template <typename T>
void launch_expand_packed_factor(const PackedFactor<T>& factor, T* dense);

// values[r, b, e] = dense[b, r, indices[r, b, e]], of a factor without values.
template <typename T>
void launch_take_nonzeros(const SparseFactor<T>& factor, const T* dense /* [blocks, rows, K] */,
                          T* values /* [rows, blocks, nnz] */);

// ---- products -----------------------------------------------------------------------------------

// output[t, r] = bias[r] + sum over b, e of values[r, b, e] * atoms[b, t, indices[r, b, e]], for few tokens, where
// reading the factor is what takes the time.
template <typename T>
struct AtomsToRows {
  SparseFactor<T> factor;
  const T* atoms;  // [blocks, T, K]
  const T* bias;   // [rows], or null
  T* output;       // [T, rows]
  int64_t num_tokens;
  int64_t chunk = 0;  // atoms that are in shared memory at a time, for the launch to choose
};

template <typename T>
void launch_atoms_to_rows(const AtomsToRows<T>& args);

// output[t, r] = bias[r] + sum over columns of the packed factor's row r times atoms[b, t, column], for few tokens.
template <typename T>
struct PackedAtomsToRows {
  PackedFactor<T> factor;
  const T* atoms;  // [blocks, T, K]
  const T* bias;   // [rows], or null
  T* output;       // [T, rows]
  int64_t num_tokens;
};

template <typename T>
void launch_packed_atoms_to_rows(const PackedAtomsToRows<T>& args);

// grad_values[r, b, e] = sum over t, in ascending order, of rows[t, r] * atoms[b, t, indices[r, b, e]].
template <typename T>
struct ValueGradient {
  SparseFactor<T> factor;  // without values
  const T* rows;           // [T, rows]
  const T* atoms;          // [blocks, T, K]
  T* grad_values;          // [rows, blocks, nnz]
  int64_t num_tokens;
};

template <typename T>
void launch_value_gradient(const ValueGradient<T>& args);

// Computes the tokens anew of which an atom is not a number (repair_tokens.cuh).
template <typename T, template <typename> typename Factor>
struct RepairTokens {
  Factor<T> factor;
  const T* atoms;  // [blocks, T, K]
  const T* bias;   // [rows], or null
  T* output;       // [T, rows]
  int64_t num_tokens;
};

template <typename T>
void launch_repair_tokens(const RepairTokens<T, SparseFactor>& args);

template <typename T>
void launch_repair_tokens(const RepairTokens<T, PackedFactor>& args);

// ---- products in parts --------------------------------------------------------------------------

// sums[part][b, t, k] = sum over the rows r of a part and the e with indices[r, b, e] = k of values[r, b, e] *
// rows[t, r], for few tokens, where reading the factor is what takes the time.
template <typename T>
struct RowsToAtoms {
  SparseFactor<T> factor;
  const T* rows;          // [T, rows]
  accumulate_t<T>* sums;  // [parts][blocks, T, K]
  int64_t num_tokens;
  int64_t part_size;  // rows
};

// sums[part][b, t, k] = sum over the rows r of a part of the packed factor's column k times rows[t, r], for few
// tokens.
template <typename T>
struct PackedRowsToAtoms {
  PackedFactor<T> factor;
  const T* rows;          // [T, rows]
  accumulate_t<T>* sums;  // [parts][blocks, T, K]
  int64_t num_tokens;
  int64_t part_size;  // groups of rows
};

// sums[part][t, r] = sum over the blocks b and columns k of a part of the packed factor's [r, b, k] times
// atoms[b, t, k], for 16-bit types.
template <typename T>
struct PackedAtomsToRowsMma {
  PackedFactor<T> factor;
  const T* atoms;  // [blocks, T, K]
  float* sums;     // [parts][T, rows]
  int64_t num_tokens;
  int64_t part_size;  // tiles of columns, counted through all blocks
  bool wide;          // atoms can be copied 16 bytes at a time
};

// sums[part][b, t, k] = sum over the rows r of a part of the packed factor's [r, b, k] times rows[t, r], for 16-bit
// types.
template <typename T>
struct PackedRowsToAtomsMma {
  PackedFactor<T> factor;
  const T* rows;  // [T, rows]
  float* sums;    // [parts][blocks, T, K]
  int64_t num_tokens;
  int64_t part_size;  // tiles of rows
  bool wide;          // rows can be copied 16 bytes at a time
};

// The parts that such a product is computed in, without its sums and part_size.
template <typename T>
Parts parts_of(const RowsToAtoms<T>& args);
template <typename T>
Parts parts_of(const PackedRowsToAtoms<T>& args);
template <typename T>
Parts parts_of(const PackedAtomsToRowsMma<T>& args);
template <typename T>
Parts parts_of(const PackedRowsToAtomsMma<T>& args);

template <typename T>
void launch_parts(const RowsToAtoms<T>& args, int64_t num_parts);
template <typename T>
void launch_parts(const PackedRowsToAtoms<T>& args, int64_t num_parts);
template <typename T>
void launch_parts(const PackedAtomsToRowsMma<T>& args, int64_t num_parts);
template <typename T>
void launch_parts(const PackedRowsToAtomsMma<T>& args, int64_t num_parts);

// output[i] = bias[i % bias_size], if there is a bias, + the sum of sums[part][i] over the parts in ascending order.
template <typename T>
struct AddParts {
  const accumulate_t<T>* sums;  // [parts][size]
  int64_t num_parts, size;
  T* output;                // [size]
  const T* bias = nullptr;  // [bias_size]
  int64_t bias_size = 1;
};

template <typename T>
void launch_add_parts(const AddParts<T>& args);

}  // namespace torchops::kernels::stf::cuda
