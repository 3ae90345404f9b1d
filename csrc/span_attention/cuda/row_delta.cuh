#pragma once

#include "core/attention/cuda/row_delta.cuh"
#include "core/cuda/mma_tile.cuh"
#include "span_attention/cuda/scores_mma.cuh"
#include "span_attention/cuda/tile.cuh"

// RowDelta, summed up as the kernels of the gradients sum up the products of grad_output with values.

namespace torchops::kernels::span_attention {

inline constexpr int row_delta_tile = 16 * mma_warps;
template <typename T, int V>
inline constexpr size_t row_delta_bytes = 2 * device::tile_bytes<T, row_delta_tile, V>;

// For 16-bit types, whose products come from matrix units: of a square of products of 16 rows with 16 rows the diagonal
// is wanted. A block of mma_threads for each tile of queries, grid [B * Hq * tiles]; rows of at most V elements.
template <typename T, int V>
__global__ void __launch_bounds__(mma_threads) row_delta_mma(RowDelta<T> args, bool wide) {
  const Sizes& sizes = args.sizes;
  const HeadTile unit = HeadTile::of_block(sizes.num_queries, sizes.num_heads, row_delta_tile);
  const int num_queries = static_cast<int>(sizes.num_queries);
  device::SharedMemory memory;
  T* grads = memory.take<T>(row_delta_tile * device::tile_stride<T, V>);
  T* outputs = memory.take<T>(row_delta_tile * device::tile_stride<T, V>);
  device::copy_tile_async<row_delta_tile, V, mma_threads>(
      grads, matrix(args.grad_output, unit.batch, unit.head, sizes.value_dim), unit.first, num_queries, wide);
  device::copy_tile_async<row_delta_tile, V, mma_threads>(
      outputs, matrix(args.output, unit.batch, unit.head, sizes.value_dim), unit.first, num_queries, wide);
  device::copy_async_commit();
  device::copy_async_wait<0>();
  device::syncthreads();
  const int warp_row = static_cast<int>(threadIdx.x) / device::warp_size * 16;
  const int first = warp_row * device::tile_stride<T, V>;
  float products[1][2][4] = {};
  device::multiply_transposed<T, V>(products, grads + first, outputs + first);
  device::for_elements(products, [&](int i, int half, int j, int e) {
    const int row = unit.first + warp_row + device::mma_row(i, half);
    if (device::mma_row(i, half) == device::mma_column(j, e) && row < num_queries) {
      const int64_t index = (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row;
      args.delta[index] =
          products[i][j][2 * half + e] - (args.grad_logsumexp == nullptr ? 0.0F : args.grad_logsumexp[index]);
    }
  });
}

}  // namespace torchops::kernels::span_attention
