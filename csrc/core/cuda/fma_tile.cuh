#pragma once

#include "core/cuda/copy_tile.cuh"
#include "core/cuda/pack.cuh"

// Products of tiles of float or double in shared memory, exact but for rounding, accumulated in the registers of
// 16 x 16 threads: of every 16 x 16 elements a thread has one, or of a row of 64 four, in packs of 16 bytes.

namespace torchops::device {

inline constexpr int fma_side = 16;
inline constexpr int fma_threads = fma_side * fma_side;
// Columns of a tile, which is a slice of longer rows.
inline constexpr int slice = 64;

// Its own row and column among 16 x 16.
__device__ __forceinline__ int fma_row() {
  return static_cast<int>(threadIdx.x) / fma_side;
}
__device__ __forceinline__ int fma_column() {
  return static_cast<int>(threadIdx.x) % fma_side;
}

// Where the e-th of a thread's four elements of a row of a slice lies.
template <typename T>
__device__ __forceinline__ int slice_column(int e) {
  constexpr int width = widest<T>;
  return e / width * fma_side * width + fma_column() * width + e % width;
}

// Of four rows alike.
template <typename T>
__device__ __forceinline__ int slice_row(int i) {
  constexpr int width = widest<T>;
  return i / width * fma_side * width + fma_row() * width + i % width;
}

// sum[i][j] += a_i . b_j over a slice, for rows i = fma_row() + 16 i of a and j = fma_column() + 16 j of b.
template <typename T, int r>
__device__ __forceinline__ void multiply_slices(T (&sum)[r][r], const T* a, const T* b) {
  constexpr int width = widest<T>, stride = tile_stride<T, slice>;
#pragma unroll 2
  for (int k = 0; k < slice; k += width) {
    Pack<T, width> a_packs[r], b_packs[r];
#pragma unroll
    for (int i = 0; i < r; ++i) {
      a_packs[i] = load_pack<width>(a + (fma_row() + fma_side * i) * stride + k);
      b_packs[i] = load_pack<width>(b + (fma_column() + fma_side * i) * stride + k);
    }
#pragma unroll
    for (int e = 0; e < width; ++e) {
#pragma unroll
      for (int i = 0; i < r; ++i) {
#pragma unroll
        for (int j = 0; j < r; ++j) {
          sum[i][j] += a_packs[i].element[e] * b_packs[j].element[e];
        }
      }
    }
  }
}

// sum[i][e] += sum over k of weights[fma_row() + 16 i][k] * b[k][slice_column(e)] for square weights of 16 r rows.
template <typename T, int r>
__device__ __forceinline__ void multiply_weights(T (&sum)[r][4], const T* weights, const T* b) {
  constexpr int width = widest<T>, stride = tile_stride<T, fma_side * r>, b_stride = tile_stride<T, slice>;
#pragma unroll 2
  for (int k = 0; k < fma_side * r; k += width) {
    Pack<T, width> factors[r];
#pragma unroll
    for (int i = 0; i < r; ++i) {
      factors[i] = load_pack<width>(weights + (fma_row() + fma_side * i) * stride + k);
    }
#pragma unroll
    for (int offset = 0; offset < width; ++offset) {
#pragma unroll
      for (int part = 0; part < 4 / width; ++part) {
        const auto pack = load_pack<width>(b + (k + offset) * b_stride + slice_column<T>(part * width));
#pragma unroll
        for (int i = 0; i < r; ++i) {
#pragma unroll
          for (int e = 0; e < width; ++e) {
            sum[i][part * width + e] += factors[i].element[offset] * pack.element[e];
          }
        }
      }
    }
  }
}

// sum[i][e] += sum over k of a[k][slice_row(i)] * b[k][slice_column(e)] for `depth` rows of slices.
template <int depth, typename T>
__device__ __forceinline__ void multiply_columns(T (&sum)[4][4], const T* a, const T* b) {
  constexpr int width = widest<T>, stride = tile_stride<T, slice>;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    T left[4], right[4];
#pragma unroll
    for (int part = 0; part < 4; part += width) {
      const auto a_pack = load_pack<width>(a + k * stride + slice_row<T>(part));
      const auto b_pack = load_pack<width>(b + k * stride + slice_column<T>(part));
#pragma unroll
      for (int e = 0; e < width; ++e) {
        left[part + e] = a_pack.element[e];
        right[part + e] = b_pack.element[e];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[i][e] += left[i] * right[e];
      }
    }
  }
}

// Writes a thread's weights [r][r] where multiply_weights reads them.
template <typename T, int r>
__device__ __forceinline__ void store_weights(T* to, const T (&weights)[r][r]) {
#pragma unroll
  for (int i = 0; i < r; ++i) {
#pragma unroll
    for (int j = 0; j < r; ++j) {
      to[(fma_row() + fma_side * i) * tile_stride<T, fma_side * r> + fma_column() + fma_side * j] = weights[i][j];
    }
  }
}

// Writes the s-th slice of accumulated rows below `end`, multiplied by factor(i).
template <typename T, int r, typename Factor>
__device__ __forceinline__ void store_slice(const MatrixRows<T>& to, const T (&sum)[r][4], int s, int first, int end,
                                            const Factor& factor) {
#pragma unroll
  for (int i = 0; i < r; ++i) {
    const int row = first + fma_row() + fma_side * i;
    const T scale = factor(i);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = s * slice + slice_column<T>(e);
      if (row < end && column < to.size) {
        to.data[row * to.row_stride + column] = sum[i][e] * scale;
      }
    }
  }
}

}  // namespace torchops::device
