#pragma once

#include "core/cuda/copy_tile.cuh"

// Products of tiles of 16-bit elements in shared memory, accumulated in the registers of a warp. An accumulator
// [m][n][4] has 16 m rows and 8 n columns: of block (i, j) a lane has rows 16 i + lane / 4 (elements 0, 1) and
// 8 below it (elements 2, 3), at columns 8 j + lane % 4 * 2 and the next.

namespace torchops::device {

__device__ __forceinline__ int mma_row(int block, int half) {
  return 16 * block + 8 * half + static_cast<int>(threadIdx.x) % warp_size / 4;
}
__device__ __forceinline__ int mma_column(int block, int element) {
  return 8 * block + static_cast<int>(threadIdx.x) % 4 * 2 + element;
}

// Calls body(i, half, j, e) for every element sum[i][j][2 * half + e] of an accumulator, column by column: what
// belongs to a column is in a register for as long as the column takes.
template <int m, int n, typename Body>
__device__ __forceinline__ void for_elements(float (&)[m][n][4], const Body& body) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < m; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          body(i, half, j, e);
        }
      }
    }
  }
}

// sum += a b^T over `depth` columns of 16 m rows of a and 8 n rows of b.
template <typename T, int depth, int m, int n>
__device__ __forceinline__ void multiply_transposed(float (&sum)[m][n][4], const T* a, const T* b) {
  static_assert(depth % 16 == 0 && n % 2 == 0);
  constexpr int stride = tile_stride<T, depth>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const T* a_row = a + lane % 16 * stride + lane / 16 * 8;
  const T* b_row = b + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_fragments[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      ldmatrix(a_fragments[i], a_row + 16 * i * stride + k);
    }
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      uint32_t b_fragments[4];  // two of them
      ldmatrix(b_fragments, b_row + 8 * j * stride + k);
#pragma unroll
      for (int i = 0; i < m; ++i) {
        mma_m16n8k16<T>(sum[i][j], a_fragments[i], {b_fragments[0], b_fragments[1]});
        mma_m16n8k16<T>(sum[i][j + 1], a_fragments[i], {b_fragments[2], b_fragments[3]});
      }
    }
  }
}

// sum += a b over 16 rows of b, where b_row is the place that ldmatrix_trans takes of the lane.
template <typename T, int m, int n>
__device__ __forceinline__ void add_products(float (&sum)[m][n][4], const uint32_t (&a)[m][4], const T* b_row) {
#pragma unroll
  for (int j = 0; j < n; j += 2) {
    uint32_t b[4];
    ldmatrix_trans(b, b_row + 8 * j);
#pragma unroll
    for (int i = 0; i < m; ++i) {
      mma_m16n8k16<T>(sum[i][j], a[i], {b[0], b[1]});
      mma_m16n8k16<T>(sum[i][j + 1], a[i], {b[2], b[3]});
    }
  }
}

// sum += a b over `depth` columns of 16 m rows of a; b has as many rows of `b_columns` elements, of which the first 8 n
// take part.
template <typename T, int depth, int b_columns, int m, int n>
__device__ __forceinline__ void multiply(float (&sum)[m][n][4], const T* a, const T* b) {
  static_assert(depth % 16 == 0 && n % 2 == 0);
  constexpr int a_stride = tile_stride<T, depth>, b_stride = tile_stride<T, b_columns>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const T* a_row = a + lane % 16 * a_stride + lane / 16 * 8;
  const T* b_row = b + lane % 16 * b_stride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_fragments[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      ldmatrix(a_fragments[i], a_row + 16 * i * a_stride + k);
    }
    add_products<T>(sum, a_fragments, b_row + k * b_stride);
  }
}

// sum += a^T b over `depth` rows of a and b, which have a_columns and b_columns elements: the first 16 m and 8 n of
// them take part.
template <typename T, int depth, int a_columns, int b_columns, int m, int n>
__device__ __forceinline__ void multiply_columns(float (&sum)[m][n][4], const T* a, const T* b) {
  static_assert(depth % 16 == 0 && n % 2 == 0);
  constexpr int a_stride = tile_stride<T, a_columns>, b_stride = tile_stride<T, b_columns>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const T* a_row = a + (lane / 16 * 8 + lane % 8) * a_stride + lane / 8 % 2 * 8;
  const T* b_row = b + lane % 16 * b_stride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_fragments[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      ldmatrix_trans(a_fragments[i], a_row + k * a_stride + 16 * i);
    }
    add_products<T>(sum, a_fragments, b_row + k * b_stride);
  }
}

// sum += a b, where a is an accumulator, rounded to T, and b has 8 k rows of `b_columns` elements, of which the
// first 8 n take part.
template <typename T, int b_columns, int m, int k, int n>
__device__ __forceinline__ void multiply_rounded(float (&sum)[m][n][4], const float (&a)[m][k][4], const T* b) {
  static_assert(k % 2 == 0 && n % 2 == 0);
  constexpr int stride = tile_stride<T, b_columns>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const T* b_row = b + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < k; step += 2) {
    // Two blocks of an accumulator lie in registers as a fragment of a does.
    uint32_t a_fragments[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float* pair = a[i][step + word / 2] + word % 2 * 2;
        a_fragments[i][word] = pack<T>(pair[0], pair[1]);
      }
    }
    add_products<T>(sum, a_fragments, b_row + 8 * step * stride);
  }
}

// Writes an accumulator, multiplied by factor(block, half) of its row, to rows of shared memory.
template <typename T, int m, int n, typename Factor>
__device__ __forceinline__ void store_accumulator(T* rows, int stride, const float (&sum)[m][n][4],
                                                  const Factor& factor) {
#pragma unroll
  for (int i = 0; i < m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = factor(i, half);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float* pair = sum[i][j] + 2 * half;
        *reinterpret_cast<uint32_t*>(rows + mma_row(i, half) * stride + mma_column(j, 0)) =
            pack<T>(pair[0] * scale, pair[1] * scale);
      }
    }
  }
}

}  // namespace torchops::device
