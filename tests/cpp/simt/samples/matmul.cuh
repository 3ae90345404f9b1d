#pragma once

#include "core/cuda/device.cuh"
#include "samples/mutation.h"

namespace torchops::kernels::samples {

inline constexpr int matmul_tile = 32;      // rows, columns and depth of a tile
inline constexpr int matmul_threads = 128;  // two by two warps of 16 x 16 elements

// The 16 bytes of padding put the rows of ldmatrix into different banks.
inline constexpr int matmul_stride = matmul_tile + 8;

template <typename T>
size_t matmul_shared() {
  return 2 * device::shared_size<T>(2 * matmul_tile * matmul_stride);
}

// Copies a 32 x 32 tile, zeros where it reaches beyond the matrix; 16 bytes a thread.
template <typename T, Mutation mutation>
__device__ inline void copy_tile(T* tile, const T* matrix, int num_rows, int num_columns, int first_row,
                                 int first_column) {
  const int row = static_cast<int>(threadIdx.x) / 4;
  const int column = static_cast<int>(threadIdx.x) % 4 * 8;
  const bool inside = first_row + row < num_rows && first_column + column < num_columns;
  const bool valid = inside || mutation == Mutation::no_predicate;
  const T* from = matrix + (valid ? static_cast<int64_t>(first_row + row) * num_columns + first_column + column : 0);
  device::copy_async<16>(tile + row * matmul_stride + column, from, valid);
}

// c = a b, a tile of c per block (blockIdx.x: columns, blockIdx.y: rows). N and K are multiples of 8.
// While one pair of tiles is multiplied, the next one is on its way.
template <typename T, Mutation mutation = Mutation::none>
__global__ void matmul(const T* __restrict__ a,  // [M, K]
                       const T* __restrict__ b,  // [K, N]
                       float* __restrict__ c,    // [M, N]
                       int m, int n, int k) {
  device::SharedMemory shared;
  T* a_tiles = shared.take<T>(2 * matmul_tile * matmul_stride);
  T* b_tiles = shared.take<T>(2 * matmul_tile * matmul_stride);
  constexpr int tile_elements = matmul_tile * matmul_stride;
  const int first_row = static_cast<int>(blockIdx.y) * matmul_tile;
  const int first_column = static_cast<int>(blockIdx.x) * matmul_tile;
  const int num_steps = (k + matmul_tile - 1) / matmul_tile;
  const auto copy_tiles = [&](int step) {
    if (step < num_steps) {
      const int half = step % 2 * tile_elements;
      copy_tile<T, mutation>(a_tiles + half, a, m, k, first_row, step * matmul_tile);
      copy_tile<T, mutation>(b_tiles + half, b, k, n, step * matmul_tile, first_column);
    }
    device::copy_async_commit();
  };

  const int lane = static_cast<int>(threadIdx.x) % device::warp_size;
  const int warp = static_cast<int>(threadIdx.x) / device::warp_size;
  const int warp_row = warp / 2 * 16;
  const int warp_column = warp % 2 * 16;
  float sum[2][4] = {};
  copy_tiles(0);
  for (int step = 0; step < num_steps; ++step) {
    copy_tiles(step + 1);
    if (mutation == Mutation::weak_wait) {
      device::copy_async_wait<2>();
    } else if (mutation != Mutation::no_wait) {
      device::copy_async_wait<1>();
    }
    if (mutation != Mutation::no_barrier) {
      device::syncthreads();
    }
    const T* a_tile = a_tiles + step % 2 * tile_elements;
    const T* b_tile = b_tiles + step % 2 * tile_elements;
#pragma unroll
    for (int depth = 0; depth < matmul_tile; depth += 16) {
      uint32_t a_fragment[4];
      uint32_t b_fragments[4];  // two of them, for 16 columns
      device::ldmatrix(a_fragment, a_tile + (warp_row + lane % 16) * matmul_stride + depth + lane / 16 * 8);
      device::ldmatrix_trans(b_fragments, b_tile + (depth + lane % 16) * matmul_stride + warp_column + lane / 16 * 8);
      device::mma_m16n8k16<T>(sum[0], a_fragment, {b_fragments[0], b_fragments[1]});
      device::mma_m16n8k16<T>(sum[1], a_fragment, {b_fragments[2], b_fragments[3]});
    }
    if (mutation != Mutation::no_refill_barrier) {
      device::syncthreads();
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + warp_row + lane / 4 + i / 2 * 8;
      const int column = first_column + warp_column + half * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) {
        c[static_cast<int64_t>(row) * n + column] = sum[half][i];
      }
    }
  }
}

}  // namespace torchops::kernels::samples
