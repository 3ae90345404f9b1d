#pragma once

#include "core/cuda/block.cuh"
#include "stf/cuda/launches.h"
#include "stf/cuda/packed_value.cuh"

namespace torchops::kernels::stf::cuda {

inline constexpr int packed_columns_of_thread = 4;
inline constexpr int packed_scatter_most_threads = 256;

template <typename T>
constexpr size_t packed_scatter_shared_bytes(int tokens) {
  return device::shared_size<int32_t>(device::max_warps) +
         device::shared_size<accumulate_t<T>>(static_cast<size_t>(rows_per_group * tokens));
}

// A block has a chunk of packed_columns_of_thread neighbouring columns for each thread, a part of the groups and
// `tokens` tokens; a thread adds up its columns in ascending order of rows. Grid [blocks * chunks, parts,
// T / tokens].
template <int tokens, typename T>
__global__ void packed_rows_to_atoms(PackedRowsToAtoms<T> args) {
  using A = accumulate_t<T>;
  const PackedFactor<T>& factor = args.factor;
  device::SharedMemory memory;
  int32_t* const shared_sums = memory.take<int32_t>(device::max_warps);
  A* const inputs = memory.take<A>(static_cast<size_t>(rows_per_group * tokens));  // [16, tokens]
  const int64_t block = blockIdx.x % factor.num_blocks;
  const int64_t first = blockIdx.x / factor.num_blocks * (int64_t{blockDim.x} * packed_columns_of_thread);
  const int64_t first_of_thread = first + int64_t{threadIdx.x} * packed_columns_of_thread;
  const int64_t first_token = int64_t{blockIdx.z} * tokens;
  const int64_t end = device::min((int64_t{blockIdx.y} + 1) * args.part_size, factor.num_groups());

  A sum[packed_columns_of_thread][tokens] = {};
  for (int64_t group = blockIdx.y * args.part_size; group < end; ++group) {
    const uint16_t* const mask = factor.mask + (group * factor.num_blocks + block) * factor.basis_size;
    const T* const values = factor.values + (group * factor.num_blocks + block) * rows_per_group * factor.nnz;
    for (int64_t i = threadIdx.x; i < rows_per_group * tokens; i += blockDim.x) {
      const int64_t token = first_token + i % tokens, row = group * rows_per_group + i / tokens;
      inputs[i] = token < args.num_tokens && row < factor.num_rows
                      ? A(device::widen(args.rows[token * factor.num_rows + row]))
                      : A(0);
    }
    int32_t before_chunk = 0;
    if (first > 0) {
      int32_t count = 0;
      for (int64_t column = threadIdx.x; column < first; column += blockDim.x) {
        count += device::popc(mask[column]);
      }
      device::exclusive_sum(count, shared_sums, before_chunk);
    }
    uint32_t rows_of_column[packed_columns_of_thread];
    int32_t count = 0;
#pragma unroll
    for (int j = 0; j < packed_columns_of_thread; ++j) {
      rows_of_column[j] = first_of_thread + j < factor.basis_size ? mask[first_of_thread + j] : 0;
      count += device::popc(rows_of_column[j]);
    }
    // Behind the barriers of exclusive_sum the inputs are there.
    int32_t in_chunk;
    int64_t at = before_chunk + device::exclusive_sum(count, shared_sums, in_chunk);
#pragma unroll
    for (int j = 0; j < packed_columns_of_thread; ++j) {
      for (uint32_t rows = rows_of_column[j]; rows != 0; rows &= rows - 1, ++at) {
        const int row = device::ffs(rows) - 1;
        const A value = device::widen(packed_value(factor, values, at));
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
          sum[j][t] += value * inputs[row * tokens + t];
        }
      }
    }
    device::syncthreads();
  }
#pragma unroll
  for (int j = 0; j < packed_columns_of_thread; ++j) {
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      if (first_of_thread + j < factor.basis_size && first_token + t < args.num_tokens) {
        const int64_t part_and_block = blockIdx.y * factor.num_blocks + block;
        args.sums[(part_and_block * args.num_tokens + first_token + t) * factor.basis_size + first_of_thread + j] =
            sum[j][t];
      }
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
