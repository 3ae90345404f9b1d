#pragma once

#include "core/cpu/level.h"
#include "stf/packed_factor.h"

// Products of a packed factor and many tokens in bfloat16 on tiles, into which its masks are spread on the way. Only
// the level amx has them.

#if defined(__x86_64__)

namespace torchops::kernels::stf {

struct PackedTileProduct {
  PackedFactor<bfloat16> factor;
  // Atoms to rows: output[t, r] = bias[r] + sum over columns of the factor's row r times tokens[b, t, column].
  // Rows to atoms: output[b, t, k] = sum over rows of the factor's column k times tokens[t, r].
  bool to_atoms;
  const bfloat16* tokens;  // [blocks, T, K], resp. [T, rows]
  int64_t block_stride;    // resp. 0
  int64_t token_stride;
  const bfloat16* bias;  // [rows], or null
  bfloat16* output;      // [T, rows], resp. [blocks, T, K]
  int64_t num_tokens;
};

namespace amx {
int64_t packed_tile_units(const PackedTileProduct& args);
int64_t packed_tile_scratch_bytes(const PackedTileProduct& args);
// False if a mask does not have 16 * nnz bits.
bool packed_tile_product(const PackedTileProduct& args, void* scratch, int64_t begin, int64_t end);
}  // namespace amx

}  // namespace torchops::kernels::stf

#endif
