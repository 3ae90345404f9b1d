#pragma once

#include "stf/cuda/expand_packed_tile.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

// As many as leave room for the sums in registers.
inline constexpr int packed_scatter_tile_columns = 128;

template <typename T>
inline constexpr size_t packed_scatter_mma_shared_bytes =
    device::tile_bytes<T, packed_tile_rows, packed_scatter_tile_columns> +
    device::tile_bytes<T, packed_tile_tokens, packed_tile_rows>;

// A block of packed_tile_threads has packed_scatter_tile_columns columns of one block of the factor and
// packed_tile_tokens tokens, a warp a quarter of the columns. Grid [blocks * (K / packed_scatter_tile_columns), T /
// packed_tile_tokens, parts].
template <typename T>
__global__ void __launch_bounds__(packed_tile_threads) packed_rows_to_atoms_mma(PackedRowsToAtomsMma<T> args) {
  constexpr int columns_of_warp = packed_scatter_tile_columns / packed_tile_warps;
  const PackedFactor<T>& factor = args.factor;
  device::SharedMemory memory;
  T* const tile = memory.take<T>(packed_tile_rows * device::tile_stride<T, packed_scatter_tile_columns>);
  T* const rows = memory.take<T>(packed_tile_tokens * device::tile_stride<T, packed_tile_rows>);
  const int num_tokens = static_cast<int>(args.num_tokens);
  const int first_token = static_cast<int>(blockIdx.y) * packed_tile_tokens;
  const int64_t block = blockIdx.x % factor.num_blocks;
  const int64_t first = blockIdx.x / factor.num_blocks * packed_scatter_tile_columns;
  const int column_of_warp = device::warp_index() * columns_of_warp;
  const int64_t begin = blockIdx.z * args.part_size * packed_tile_rows;
  const int64_t end = device::min(begin + args.part_size * packed_tile_rows, factor.num_rows);

  float sum[packed_tile_tokens / 16][columns_of_warp / 8][4] = {};
  for (int64_t first_row = begin; first_row < end; first_row += packed_tile_rows) {
    const device::MatrixRows<const T> from{args.rows + first_row, factor.num_rows,
                                           static_cast<int>(factor.num_rows - first_row)};
    device::copy_tile_async<packed_tile_tokens, packed_tile_rows, packed_tile_threads>(rows, from, first_token,
                                                                                       num_tokens, args.wide);
    device::copy_async_commit();
    expand_packed_tile<packed_scatter_tile_columns>(factor, first_row, block, first, tile);
    device::copy_async_wait<0>();
    device::syncthreads();
    device::multiply<T, packed_tile_rows, packed_scatter_tile_columns>(sum, rows, tile + column_of_warp);
    device::syncthreads();
  }
  float* const sums = args.sums + (blockIdx.z * factor.num_blocks + block) * args.num_tokens * factor.basis_size;
  device::for_elements(sum, [&](int i, int half, int j, int e) {
    const int64_t token = first_token + device::mma_row(i, half);
    const int64_t column = first + column_of_warp + device::mma_column(j, e);
    if (token < num_tokens && column < factor.basis_size) {
      sums[token * factor.basis_size + column] = sum[i][j][2 * half + e];
    }
  });
}

}  // namespace torchops::kernels::stf::cuda
