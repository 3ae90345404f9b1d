#pragma once

#include "stf/cuda/expand_packed_tile.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

inline constexpr int packed_gather_tile_columns = 256;

template <typename T>
inline constexpr size_t packed_gather_mma_shared_bytes =
    device::tile_bytes<T, packed_tile_rows, packed_gather_tile_columns> +
    device::tile_bytes<T, packed_tile_tokens, packed_gather_tile_columns>;

// A block of packed_tile_threads has packed_tile_rows rows and packed_tile_tokens tokens, a warp a quarter of the
// pairs. Grid [rows / packed_tile_rows, T / packed_tile_tokens, parts].
template <typename T>
__global__ void __launch_bounds__(packed_tile_threads) packed_atoms_to_rows_mma(PackedAtomsToRowsMma<T> args) {
  constexpr int stride = device::tile_stride<T, packed_gather_tile_columns>;
  constexpr int tokens_of_warp = packed_tile_tokens / 2, rows_of_warp = packed_tile_rows / 2;
  const PackedFactor<T>& factor = args.factor;
  device::SharedMemory memory;
  T* const tile = memory.take<T>(packed_tile_rows * stride);
  T* const atoms = memory.take<T>(packed_tile_tokens * stride);
  const int num_tokens = static_cast<int>(args.num_tokens);
  const int first_token = static_cast<int>(blockIdx.y) * packed_tile_tokens;
  const int64_t first_row = int64_t{blockIdx.x} * packed_tile_rows;
  const int token_of_warp = device::warp_index() % 2 * tokens_of_warp;
  const int row_of_warp = device::warp_index() / 2 * rows_of_warp;
  const int64_t tiles_of_block = (factor.basis_size + packed_gather_tile_columns - 1) / packed_gather_tile_columns;
  const int64_t begin = blockIdx.z * args.part_size;
  const int64_t end = device::min(begin + args.part_size, factor.num_blocks * tiles_of_block);

  float sum[tokens_of_warp / 16][rows_of_warp / 8][4] = {};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / tiles_of_block, first = unit % tiles_of_block * packed_gather_tile_columns;
    const device::MatrixRows<const T> from{args.atoms + block * args.num_tokens * factor.basis_size + first,
                                           factor.basis_size, static_cast<int>(factor.basis_size - first)};
    device::copy_tile_async<packed_tile_tokens, packed_gather_tile_columns, packed_tile_threads>(
        atoms, from, first_token, num_tokens, args.wide);
    device::copy_async_commit();
    expand_packed_tile<packed_gather_tile_columns>(factor, first_row, block, first, tile);
    device::copy_async_wait<0>();
    device::syncthreads();
    device::multiply_transposed<T, packed_gather_tile_columns>(sum, atoms + token_of_warp * stride,
                                                               tile + row_of_warp * stride);
    device::syncthreads();
  }
  float* const sums = args.sums + blockIdx.z * args.num_tokens * factor.num_rows;
  device::for_elements(sum, [&](int i, int half, int j, int e) {
    const int64_t token = first_token + token_of_warp + device::mma_row(i, half);
    const int64_t row = first_row + row_of_warp + device::mma_column(j, e);
    if (token < num_tokens && row < factor.num_rows) {
      sums[token * factor.num_rows + row] = sum[i][j][2 * half + e];
    }
  });
}

}  // namespace torchops::kernels::stf::cuda
