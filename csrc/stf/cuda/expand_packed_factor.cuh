#pragma once

#include "core/cuda/block.cuh"
#include "stf/cuda/packed_value.cuh"

namespace torchops::kernels::stf::cuda {

// A block per group of rows and block of the factor; a thread writes a column of the group to dense
// [rows, blocks, K].
template <typename T>
__global__ void expand_packed_factor(PackedFactor<T> factor, T* dense) {
  device::SharedMemory memory;
  int32_t* const sums = memory.take<int32_t>(device::max_warps);
  const int64_t group = blockIdx.x / factor.num_blocks, block = blockIdx.x % factor.num_blocks;
  const uint16_t* const mask = factor.mask + int64_t{blockIdx.x} * factor.basis_size;
  const T* const values = factor.values + int64_t{blockIdx.x} * rows_per_group * factor.nnz;

  int64_t begin = 0;
  for (int64_t first = 0; first < factor.basis_size; first += blockDim.x) {
    const int64_t column = first + threadIdx.x;
    const uint32_t rows_of_column = column < factor.basis_size ? mask[column] : 0;
    int32_t count;
    int64_t at = begin + device::exclusive_sum(device::popc(rows_of_column), sums, count);
    begin += count;
    for (int64_t row = 0; row < factor.rows_in_group(group) && column < factor.basis_size; ++row) {
      const bool has_column = (rows_of_column >> row & 1) != 0;
      dense[((group * rows_per_group + row) * factor.num_blocks + block) * factor.basis_size + column] =
          has_column ? packed_value(factor, values, at) : T{};
      at += has_column ? 1 : 0;
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
