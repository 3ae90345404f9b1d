#pragma once

#include "core/cuda/mma_tile.cuh"
#include "span_attention/cuda/tile.cuh"

// Scores in the accumulators of a warp.

namespace torchops::kernels::span_attention {

inline constexpr int mma_warps = 4;
inline constexpr int mma_threads = mma_warps * device::warp_size;

// Replaces what a row does not see by `hidden`, if some row does not see all. Rows are counted from first_row of the
// tile, columns stand for first, first + 1, ...
template <int m, int n>
__device__ __forceinline__ void hide(float (&scores)[m][n][4], const VisibleRange& visible, int first_row, int first,
                                     float hidden) {
  if (!visible.is_edge(first, 8 * n)) {
    return;
  }
#pragma unroll
  for (int i = 0; i < m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int2 seen = visible.of_row[first_row + device::mma_row(i, half)];
#pragma unroll
      for (int j = 0; j < n; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[i][j][2 * half + e];
          const int column = first + device::mma_column(j, e);
          score = seen.x <= column && column < seen.y ? score : hidden;
        }
      }
    }
  }
}

// A value of a row that the four lanes of the row have parts of.
template <typename Combine>
__device__ __forceinline__ float over_lanes_of_row(float value, const Combine& combine) {
  value = combine(value, device::shuffle_xor(value, 1));
  return combine(value, device::shuffle_xor(value, 2));
}

}  // namespace torchops::kernels::span_attention
