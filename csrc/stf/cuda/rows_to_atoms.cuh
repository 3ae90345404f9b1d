#pragma once

#include "stf/cuda/expand_row.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

inline constexpr int columns_of_thread = 4;
inline constexpr int scatter_most_threads = 256;

// Rows that are dense in shared memory at a time.
template <typename T>
inline constexpr int64_t tile_rows = 64 / sizeof(accumulate_t<T>);

template <typename T>
constexpr size_t scatter_shared_bytes(int64_t threads, int tokens) {
  using A = accumulate_t<T>;
  return device::shared_size<A>(static_cast<size_t>(tile_rows<T> * threads * columns_of_thread)) +
         device::shared_size<A>(static_cast<size_t>(tile_rows<T> * tokens));
}

// A block has a chunk of columns_of_thread columns for each thread, a part of the rows and `tokens` tokens. The
// warps write a tile of rows as a dense matrix, then each thread adds up its columns in ascending order of rows:
// no two threads add to one number. Grid [blocks * chunks, parts, T / tokens].
template <int tokens, typename T>
__global__ void rows_to_atoms(RowsToAtoms<T> args) {
  using A = accumulate_t<T>;
  const SparseFactor<T>& factor = args.factor;
  const int64_t chunk = int64_t{blockDim.x} * columns_of_thread;
  device::SharedMemory memory;
  A* const dense = memory.take<A>(static_cast<size_t>(tile_rows<T> * chunk));    // [tile_rows, chunk]
  A* const inputs = memory.take<A>(static_cast<size_t>(tile_rows<T> * tokens));  // [tile_rows, tokens]
  const int64_t block = blockIdx.x % factor.num_blocks;
  const int64_t first = blockIdx.x / factor.num_blocks * chunk;
  const int64_t count = device::min(chunk, factor.basis_size - first);
  const int64_t first_token = int64_t{blockIdx.z} * tokens;
  const int64_t end = device::min((int64_t{blockIdx.y} + 1) * args.part_size, factor.num_rows);

  A sum[columns_of_thread][tokens] = {};
  for (int64_t first_row = blockIdx.y * args.part_size; first_row < end; first_row += tile_rows<T>) {
    const int64_t num_rows = device::min(tile_rows<T>, end - first_row);
    for (int64_t r = device::warp_index(); r < num_rows; r += blockDim.x / device::warp_size) {
      expand_row(factor, first_row + r, block, first, count, dense + r * chunk);
    }
    for (int64_t i = threadIdx.x; i < num_rows * tokens; i += blockDim.x) {
      const int64_t token = first_token + i % tokens;
      inputs[i] = token < args.num_tokens
                      ? A(device::widen(args.rows[token * factor.num_rows + first_row + i / tokens]))
                      : A(0);
    }
    device::syncthreads();
    for (int64_t r = 0; r < num_rows; ++r) {
#pragma unroll
      for (int j = 0; j < columns_of_thread; ++j) {
        const int64_t c = threadIdx.x + int64_t{blockDim.x} * j;
        const A value = c < count ? dense[r * chunk + c] : A(0);
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
          sum[j][t] += value * inputs[r * tokens + t];
        }
      }
    }
    device::syncthreads();
  }
#pragma unroll
  for (int j = 0; j < columns_of_thread; ++j) {
    const int64_t c = threadIdx.x + int64_t{blockDim.x} * j;
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      if (c < count && first_token + t < args.num_tokens) {
        const int64_t part_and_block = blockIdx.y * factor.num_blocks + block;
        args.sums[(part_and_block * args.num_tokens + first_token + t) * factor.basis_size + first + c] = sum[j][t];
      }
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
