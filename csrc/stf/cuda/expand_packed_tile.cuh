#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/mma_tile.cuh"
#include "stf/cuda/packed_value.cuh"

// Tiles of a packed factor as dense matrices in shared memory, for products with some tens of tokens of 16-bit types:
// matrix units multiply its zeros faster than threads go round them, and nothing dense is written to global memory.

namespace torchops::kernels::stf::cuda {

inline constexpr int packed_tile_warps = 4;
inline constexpr int packed_tile_threads = packed_tile_warps * device::warp_size;
inline constexpr int packed_tile_tokens = 64;
inline constexpr int packed_tile_rows = packed_tile_warps * static_cast<int>(rows_per_group);  // a group for each warp

// Rows first_row.. and columns first.. of a block of the factor, with zeros where the factor ends, as a tile
// [packed_tile_rows, tile_stride of columns]. Every warp of the block calls it; the tile can be read behind a barrier.
template <int columns, typename T>
__device__ void expand_packed_tile(const PackedFactor<T>& factor, int64_t first_row, int64_t block, int64_t first,
                                   T* tile) {
  constexpr int stride = device::tile_stride<T, columns>;
  const int lane = device::lane_index();
  const int64_t group = first_row / rows_per_group + device::warp_index();
  const int64_t num_rows = group < factor.num_groups() ? factor.rows_in_group(group) : 0;
  const uint16_t* const mask = factor.mask + (group * factor.num_blocks + block) * factor.basis_size;
  const T* const values = factor.values + (group * factor.num_blocks + block) * rows_per_group * factor.nnz;
  T* const rows = tile + device::warp_index() * rows_per_group * stride;

  int32_t begin = 0;  // values before the columns that the warp is at
  for (int64_t column = lane; column < first && num_rows > 0; column += device::warp_size) {
    begin += device::popc(mask[column]);
  }
  for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
    begin += device::shuffle_xor(begin, bits);
  }
  for (int c = lane; c < columns; c += device::warp_size) {
    const uint32_t rows_of_column = num_rows > 0 && first + c < factor.basis_size ? mask[first + c] : 0;
    const int32_t count = device::popc(rows_of_column);
    const int32_t end = device::inclusive_sum_of_warp(count);
    int32_t at = begin + end - count;
    begin += device::shuffle(end, device::warp_size - 1);
    for (int64_t row = 0; row < rows_per_group; ++row) {
      const bool has_column = (rows_of_column >> row & 1) != 0;
      rows[row * stride + c] = has_column && row < num_rows ? packed_value(factor, values, at) : T{};
      at += has_column ? 1 : 0;
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
