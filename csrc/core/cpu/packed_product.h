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

// sum[row][v] += over d in 0..depth-1 of a[row][d] * panel[d][v's columns], in ascending order of d, for
// the panel's first `vectors` vectors of columns.
template <int vectors, typename A>
inline void add_product(const A* const (&a)[tile_rows], const A* panel, int64_t depth,
                        vec<A> (&sum)[tile_rows][tile_vectors]) {
  constexpr int lane_count = vector_bytes / static_cast<int>(sizeof(A));
  vec<A> part[tile_rows][vectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    vec<A> b[vectors];
    for (int v = 0; v < vectors; ++v) {
      b[v] = load(panel + d * panel_columns<A> + v * lane_count);
    }
    for (int row = 0; row < tile_rows; ++row) {
      for (int v = 0; v < vectors; ++v) {
        part[row][v] += a[row][d] * b[v];
      }
    }
  }
  for (int row = 0; row < tile_rows; ++row) {
    for (int v = 0; v < vectors; ++v) {
      sum[row][v] += part[row][v];
    }
  }
}

// The same for a number of vectors that is known when it runs, 1..tile_vectors.
template <typename A>
inline void add_product(const A* const (&a)[tile_rows], const A* panel, int64_t depth, int vectors,
                        vec<A> (&sum)[tile_rows][tile_vectors]) {
  switch (vectors) {
    case 1:
      return add_product<1>(a, panel, depth, sum);
    case 2:
      return add_product<2>(a, panel, depth, sum);
    case 3:
      return add_product<3>(a, panel, depth, sum);
    default:
      return add_product<tile_vectors>(a, panel, depth, sum);
  }
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
