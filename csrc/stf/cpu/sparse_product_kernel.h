#pragma once

#include "core/cpu/level.h"
#include "stf/packed_factor.h"
#include "stf/sparse_factor.h"

// Products with the sparse factor, for tiles of tokens that lie side by side in vectors: every nonzero is a
// number times a vector. Tensors with tokens are brought into tiles [tiles][size][token_tile] first, the last
// tile filled up with zeros.
//
// A product adds sources (atoms, or rows) to destinations (rows, or atoms). It takes the sources in chunks whose
// tokens fit in the nearest cache, and keeps a destination's sums in registers for its nonzeros among them.
//
// A packed factor is read in the same way: its nonzeros become lists on the way to the registers.

namespace torchops::kernels::stf {

// Rows of the sparse factor that a unit of work takes, and the fewest whose sum is worth a part of its own.
inline constexpr int64_t row_block = 32;
inline constexpr int64_t rows_of_part = 256;
// Atoms that a unit of work takes.
inline constexpr int64_t atom_block = 128;
inline constexpr int64_t most_sources = 4096;

constexpr int64_t parts_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// Sources in a chunk. More than fit where the factor is so sparse that loading and storing a destination's sums
// would not pay. A multiple of the rows of a packed factor's group.
template <typename T, template <typename> typename Factor>
constexpr int64_t sources_of_chunk(const Factor<T>& factor, int64_t token_tile) {
  constexpr int64_t cache_bytes = 32 << 10, nonzeros_that_pay = 24;
  const int64_t fitting = cache_bytes / (token_tile * static_cast<int64_t>(sizeof(accumulate_t<T>)));
  const int64_t paying = factor.nnz == 0 ? 0 : parts_of(nonzeros_that_pay * factor.basis_size, factor.nnz);
  const int64_t chunk = parts_of(fitting < paying ? paying : fitting, rows_per_group) * rows_per_group;
  return chunk < most_sources ? chunk : most_sources;
}

// tokens [T, size] -> tiles.
template <typename T>
struct TokenTiles {
  const T* tokens;
  int64_t token_stride;
  int64_t num_tokens;
  int64_t size;
  int64_t token_tile;
  accumulate_t<T>* tiles;  // [tiles][size][token_tile]
};

// output[t, r] = bias[r] + sum over b, e of values[r, b, e] * atoms[b, t, indices[r, b, e]].
template <typename T, template <typename> typename Factor = SparseFactor>
struct AtomsToRows {
  Factor<T> factor;
  const accumulate_t<T>* atoms;  // [blocks][tiles][K][token_tile]
  const T* bias;                 // [rows], or null
  T* output;                     // [T, rows]
  int64_t num_tokens;
  int64_t token_tile;

  constexpr int64_t num_tiles() const { return parts_of(num_tokens, token_tile); }
  // Units are blocks of rows for tiles of tokens, block * num_tiles() + tile.
  constexpr int64_t num_units() const { return parts_of(factor.num_rows, row_block) * num_tiles(); }
};

// grad_values[r, b, e] = sum over t of rows[t, r] * atoms[b, t, indices[r, b, e]].
template <typename T>
struct ValueGradient {
  SparseFactor<T> factor;        // without values
  const accumulate_t<T>* rows;   // [tiles][rows][token_tile]
  const accumulate_t<T>* atoms;  // [blocks][tiles][K][token_tile]
  T* grad_values;                // [rows, blocks, nnz]
  int64_t num_tokens;
  int64_t token_tile;

  constexpr int64_t num_tiles() const { return parts_of(num_tokens, token_tile); }
  // Units are blocks of rows.
  constexpr int64_t num_units() const { return parts_of(factor.num_rows, row_block); }
};

// The nonzeros of every chunk of rows, in the order of blocks and atoms: an atom's sum is then gathered, for many
// tokens faster than nonzeros are added to sums in memory.
template <typename T>
struct SortedFactor {
  SparseFactor<T> factor;  // of a packed one only the sizes, with whole groups of rows
  int64_t chunk_rows;
  accumulate_t<T>* values;  // [rows * blocks * nnz]
  uint16_t* rows;           // the same: a row counted within its chunk
  int32_t* starts;          // [chunks][blocks][K + 1]: where an atom's nonzeros begin among those of chunk and block

  constexpr int64_t num_chunks() const { return parts_of(factor.num_rows, chunk_rows); }
  constexpr int64_t rows_in_chunk(int64_t chunk) const {
    const int64_t left = factor.num_rows - chunk * chunk_rows;
    return left < chunk_rows ? left : chunk_rows;
  }
  constexpr int64_t first_nonzero(int64_t chunk, int64_t block) const {
    return chunk * chunk_rows * factor.row_size() + block * rows_in_chunk(chunk) * factor.nnz;
  }
  constexpr int64_t first_start(int64_t chunk, int64_t block) const {
    return (chunk * factor.num_blocks + block) * (factor.basis_size + 1);
  }
};

// output[b, t, k] = sum over the r, e with indices[r, b, e] = k of values[r, b, e] * rows[t, r].
template <typename T>
struct SortedRowsToAtoms {
  SortedFactor<T> sorted;
  const accumulate_t<T>* rows;  // [tiles][rows][token_tile]
  T* output;                    // [blocks, T, K]
  int64_t num_tokens;
  int64_t token_tile;

  constexpr int64_t num_tiles() const { return parts_of(num_tokens, token_tile); }
  constexpr int64_t num_atom_blocks() const { return parts_of(sorted.factor.basis_size, atom_block); }
  // Units are (block * num_atom_blocks() + block of atoms) * num_tiles() + tile.
  constexpr int64_t num_units() const { return sorted.factor.num_blocks * num_atom_blocks() * num_tiles(); }
};

// The same for few tokens, where sorting does not pay. The rows are cut into parts, whose sums are added up in
// ascending order.
template <typename T>
struct RowsToAtoms {
  SparseFactor<T> factor;
  const accumulate_t<T>* rows;  // [tiles][rows][token_tile]
  accumulate_t<T>* sums;        // [parts][blocks][tiles][K][token_tile]
  T* output;                    // [blocks, T, K]
  int64_t num_tokens;
  int64_t token_tile;

  constexpr int64_t num_tiles() const { return parts_of(num_tokens, token_tile); }
  constexpr int64_t num_parts() const {
    constexpr int64_t enough_units = 32;
    const int64_t most = parts_of(factor.num_rows, rows_of_part);
    const int64_t wanted = parts_of(enough_units, factor.num_blocks * num_tiles());
    return most < 1 ? 1 : wanted < most ? wanted : most;
  }
  // Rows in a part: whole blocks.
  constexpr int64_t part_size() const {
    return parts_of(parts_of(factor.num_rows, num_parts()), row_block) * row_block;
  }
  // Units are part * num_tiles() + tile, for all blocks; resp. block * num_tiles() + tile.
  constexpr int64_t num_units() const { return num_parts() * num_tiles(); }
  constexpr int64_t num_output_units() const { return factor.num_blocks * num_tiles(); }
};

// Functions that read indices return the position of one that is out of range, -1 if there is none. Those that read a
// packed factor return -1 or a number that is not negative, if masks name other numbers of values than there are.
#define TORCHOPS_DECLARE(level)                                                                                     \
  namespace level {                                                                                                 \
  /* Tokens in a tile. */                                                                                           \
  template <typename T>                                                                                             \
  int64_t token_tile(int64_t num_tokens);                                                                           \
  /* Whether rows_to_atoms goes by a sorted factor. */                                                              \
  template <typename T>                                                                                             \
  bool sorting_pays(int64_t num_tokens);                                                                            \
  /* Units are tiles. */                                                                                            \
  template <typename T>                                                                                             \
  void token_tiles(const TokenTiles<T>& args, int64_t begin, int64_t end);                                          \
  template <typename T, template <typename> typename Factor>                                                        \
  int64_t sparse_scratch_bytes(const Factor<T>& factor, int64_t token_tile);                                        \
  template <typename T, template <typename> typename Factor>                                                        \
  int64_t atoms_to_rows(const AtomsToRows<T, Factor>& args, void* scratch, int64_t begin, int64_t end);             \
  template <typename T>                                                                                             \
  int64_t value_gradient(const ValueGradient<T>& args, void* scratch, int64_t begin, int64_t end);                  \
  /* Units are chunks of rows. */                                                                                   \
  template <typename T>                                                                                             \
  int64_t sort_rows(const SortedFactor<T>& args, int64_t begin, int64_t end);                                       \
  template <typename T>                                                                                             \
  int64_t sort_packed_rows(const SortedFactor<T>& args, const PackedFactor<T>& factor, int64_t begin, int64_t end); \
  template <typename T>                                                                                             \
  int64_t sorted_scratch_bytes(int64_t token_tile);                                                                 \
  template <typename T>                                                                                             \
  void sorted_rows_to_atoms(const SortedRowsToAtoms<T>& args, void* scratch, int64_t begin, int64_t end);           \
  template <typename T>                                                                                             \
  int64_t rows_to_atoms(const RowsToAtoms<T>& args, void* scratch, int64_t begin, int64_t end);                     \
  template <typename T>                                                                                             \
  void add_parts(const RowsToAtoms<T>& args, int64_t begin, int64_t end);                                           \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::stf
