#pragma once

#include "core/cuda/block.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

inline constexpr int pack_threads = 128;

// Which of the nonzeros from `begin` on, those of a row and block, has the column; -1 if there is none.
template <typename T>
__device__ __forceinline__ int32_t nonzero_of_column(const SparseFactor<T>& factor, int64_t begin, int64_t column) {
  int32_t low = 0, high = static_cast<int32_t>(factor.nnz);
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (factor.index(begin + middle) < column) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < factor.nnz && factor.index(begin + low) == column ? low : -1;
}

// A block per group of rows and block of the factor; a thread has a column of the group. Indices that do not increase
// or are out of range stop a debug build; in a release build the search misses some of them, and zeros take the places
// that are left at the end.
template <typename T>
__global__ void pack_factor(PackFactor<T> args) {
  constexpr int rows = static_cast<int>(rows_per_group);
  const SparseFactor<T>& factor = args.factor;
  device::SharedMemory memory;
  int32_t* const sums = memory.take<int32_t>(device::max_warps);
  const int64_t first_row = blockIdx.x / factor.num_blocks * rows_per_group, block = blockIdx.x % factor.num_blocks;
  uint16_t* const mask = args.mask + int64_t{blockIdx.x} * factor.basis_size;
  T* const values = args.values + int64_t{blockIdx.x} * rows_per_group * factor.nnz;

  int64_t begin = 0;
  for (int64_t first = 0; first < factor.basis_size; first += blockDim.x) {
    const int64_t column = first + threadIdx.x;
    int32_t nonzero[rows];
    uint32_t rows_of_column = 0;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      nonzero[r] = -1;
      if (column < factor.basis_size) {
        // Rows that complete the last group have zeros at columns 0..nnz-1.
        nonzero[r] = row < factor.num_rows
                         ? nonzero_of_column(factor, (row * factor.num_blocks + block) * factor.nnz, column)
                     : column < factor.nnz ? static_cast<int32_t>(column)
                                           : -1;
      }
      rows_of_column |= nonzero[r] >= 0 ? uint32_t{1} << r : 0;
    }
    int32_t count;
    int64_t at = begin + device::exclusive_sum(device::popc(rows_of_column), sums, count);
    begin += count;
    if (column < factor.basis_size) {
      mask[column] = static_cast<uint16_t>(rows_of_column);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      if (nonzero[r] >= 0) {
        values[at++] =
            row < factor.num_rows ? factor.values[(row * factor.num_blocks + block) * factor.nnz + nonzero[r]] : T{};
      }
    }
  }
  // A binary search finds every element of a row only if the row increases.
  device::debug_assert(begin == rows_per_group * factor.nnz, "indices increase in every row and block, up to K-1");
  for (int64_t at = begin + threadIdx.x; at < rows_per_group * factor.nnz; at += blockDim.x) {
    values[at] = T{};
  }
}

}  // namespace torchops::kernels::stf::cuda
