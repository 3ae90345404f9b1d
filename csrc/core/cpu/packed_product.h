#pragma once

#include "core/cpu/simd.h"

// The register tile of a matrix product A B^T. B's rows are packed into panels of panel_columns rows,
// transposed, [ceil(columns / panel_columns)][depth][panel_columns], so that one step along the depth
// is a few aligned vector loads; A's rows stay where they are and are broadcast element by element.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// 4 x 4 accumulators fill half of AVX-512's 32 registers, 4 x 3 most of the 16 of the other levels.
inline constexpr int tile_rows = 4;
inline constexpr int tile_vectors = vector_bytes == 64 ? 4 : 3;
template <typename A>
inline constexpr int panel_columns = tile_vectors * (vector_bytes / static_cast<int>(sizeof(A)));

template <typename A>
struct ProductTile {
  vec<A> value[tile_rows][tile_vectors];
};

// sum over d in 0..depth-1 of a[row][d] * panel[d][column], each in ascending order of d.
template <typename A>
inline ProductTile<A> product_tile(const A* const (&a)[tile_rows], const A* panel, int64_t depth) {
  constexpr int lane_count = vector_bytes / static_cast<int>(sizeof(A));
  vec<A> sum[tile_rows][tile_vectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    vec<A> b[tile_vectors];
    for (int v = 0; v < tile_vectors; ++v) {
      b[v] = load(panel + d * panel_columns<A> + v * lane_count);
    }
    for (int row = 0; row < tile_rows; ++row) {
      for (int v = 0; v < tile_vectors; ++v) {
        sum[row][v] += a[row][d] * b[v];
      }
    }
  }
  ProductTile<A> tile;
  for (int row = 0; row < tile_rows; ++row) {
    for (int v = 0; v < tile_vectors; ++v) {
      tile.value[row][v] = sum[row][v];
    }
  }
  return tile;
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
