#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/fma_tile.cuh"
#include "core/cuda/mma_tile.cuh"

// What a block multiplies at a time: a left tile with a right tile, `depth` products for each of its rows x columns
// sums. The fma kinds take float and double, the mma kinds 16-bit types.

namespace torchops::kernels::routed_ffn {

// Left tiles [rows, depth]; right tiles [columns, depth] where numbers lie along the depth, else [depth, columns].
template <typename T, bool along_depth>
struct FmaProduct {
  static constexpr int per_thread = sizeof(T) == 4 ? 4 : 2;  // rows
  static constexpr int side = device::fma_side * per_thread;
  static constexpr int threads = device::fma_threads, stages = 2;
  static constexpr int rows = side, columns = along_depth ? side : device::slice,
                       depth = along_depth ? device::slice : side;
  static constexpr int left_size = rows * device::tile_stride<T, depth>;
  static constexpr int right_size =
      along_depth ? columns * device::tile_stride<T, depth> : depth * device::tile_stride<T, columns>;

  T sum[per_thread][along_depth ? per_thread : 4] = {};

  __device__ __forceinline__ void multiply(const T* left, const T* right) {
    if constexpr (along_depth) {
      device::multiply_slices(sum, left, right);
    } else {
      device::multiply_weights(sum, left, right);
    }
  }

  // body(row, column, sum)
  template <typename Body>
  __device__ __forceinline__ void for_sums(const Body& body) const {
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
#pragma unroll
      for (int e = 0; e < static_cast<int>(sizeof(sum[0]) / sizeof(T)); ++e) {
        body(device::fma_row() + device::fma_side * i,
             along_depth ? device::fma_column() + device::fma_side * e : device::slice_column<T>(e), sum[i][e]);
      }
    }
  }
};

// Left tiles [depth, rows], right tiles [depth, columns].
template <typename T>
struct FmaGradient {
  static constexpr int threads = device::fma_threads, stages = 2;
  static constexpr int rows = device::slice, columns = device::slice, depth = 32;
  static constexpr int left_size = depth * device::tile_stride<T, rows>, right_size = left_size;

  T sum[4][4] = {};

  __device__ __forceinline__ void multiply(const T* left, const T* right) {
    device::multiply_columns<depth>(sum, left, right);
  }

  template <typename Body>
  __device__ __forceinline__ void for_sums(const Body& body) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        body(device::slice_row<T>(i), device::slice_column<T>(e), sum[i][e]);
      }
    }
  }
};

// A warp has 16 row_blocks rows and 32 columns.
template <int row_blocks>
struct MmaWarps {
  static constexpr int across = 4, count = 2 * across;
  static constexpr int threads = count * device::warp_size, stages = 3;
  static constexpr int rows = 2 * 16 * row_blocks, columns = across * 32, depth = 64;

  float sum[row_blocks][4][4] = {};

  __device__ __forceinline__ static int first_row() { return device::warp_index() / across * 16 * row_blocks; }
  __device__ __forceinline__ static int first_column() { return device::warp_index() % across * 32; }

  template <typename Body>
  __device__ __forceinline__ void for_sums(const Body& body) {
    device::for_elements(sum, [&](int i, int half, int j, int e) {
      body(first_row() + device::mma_row(i, half), first_column() + device::mma_column(j, e), sum[i][j][2 * half + e]);
    });
  }
};

// As FmaProduct.
template <typename T, int row_blocks, bool along_depth>
struct MmaProduct : MmaWarps<row_blocks> {
  using Warps = MmaWarps<row_blocks>;
  static constexpr int left_size = Warps::rows * device::tile_stride<T, Warps::depth>;
  static constexpr int right_size = along_depth ? Warps::columns * device::tile_stride<T, Warps::depth>
                                                : Warps::depth * device::tile_stride<T, Warps::columns>;

  __device__ __forceinline__ void multiply(const T* left, const T* right) {
    constexpr int stride = device::tile_stride<T, Warps::depth>;
    if constexpr (along_depth) {
      device::multiply_transposed<T, Warps::depth>(this->sum, left + Warps::first_row() * stride,
                                                   right + Warps::first_column() * stride);
    } else {
      device::multiply<T, Warps::depth, Warps::columns>(this->sum, left + Warps::first_row() * stride,
                                                        right + Warps::first_column());
    }
  }
};

// As FmaGradient.
template <typename T, int row_blocks>
struct MmaGradient : MmaWarps<row_blocks> {
  using Warps = MmaWarps<row_blocks>;
  static constexpr int left_size = Warps::depth * device::tile_stride<T, Warps::rows>;
  static constexpr int right_size = Warps::depth * device::tile_stride<T, Warps::columns>;

  __device__ __forceinline__ void multiply(const T* left, const T* right) {
    device::multiply_columns<T, Warps::depth, Warps::rows, Warps::columns>(this->sum, left + Warps::first_row(),
                                                                           right + Warps::first_column());
  }
};

}  // namespace torchops::kernels::routed_ffn
