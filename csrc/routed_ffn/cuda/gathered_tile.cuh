#pragma once

#include "core/cuda/copy_tile.cuh"
#include "routed_ffn/cuda/rows_of_groups.cuh"

namespace torchops::kernels::routed_ffn {

// Tiles [rows, tile_stride] of rows that are gathered. Of a tile a thread copies the same rows each time, and has the
// numbers of their lines.
template <int rows, int threads>
class GatheredTile {
  static constexpr int neighbours = 8, rows_at_once = threads / neighbours;  // as in copy_tile.cuh
  static_assert(rows % rows_at_once == 0);

 public:
  // Of the tile of rows first, first + 1, ... below `end`.
  template <typename T>
  __device__ __forceinline__ void find(const SortedRows<T>& from, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < rows / rows_at_once; ++i) {
      const int64_t row = first + own_row() + i * rows_at_once;
      line_[i] = row >= end ? -1 : from.lines == nullptr ? static_cast<int32_t>(row) : from.lines[row];
    }
  }

  // Starts to copy columns first, first + 1, ... below `size`; zeros stand for those behind, and for rows without a
  // line. With `wide`, 16 bytes at a time: lines begin at such multiples and `size` fills them. All threads of the
  // block call it, wait, and meet at a barrier.
  template <int columns, typename T>
  __device__ __forceinline__ void copy_async(T* tile, const SortedRows<T>& from, int64_t first, int64_t size,
                                             bool wide) const {
    constexpr int width = static_cast<int>(16 / sizeof(T));
    static_assert(columns % (neighbours * width) == 0);
    const int own_column = static_cast<int>(threadIdx.x) % neighbours * width;
    const int64_t own_columns = size - first - own_column;
#pragma unroll
    for (int i = 0; i < rows / rows_at_once; ++i) {
      T* const to = tile + (own_row() + i * rows_at_once) * device::tile_stride<T, columns> + own_column;
      const bool has_line = line_[i] >= 0;
      const T* const source = from.data + (has_line ? line_[i] * from.stride + first + own_column : 0);
#pragma unroll
      for (int column = 0; column < columns; column += neighbours * width) {
        if (wide) {
          device::copy_async<16>(to + column, source + column, has_line && column < own_columns);
          continue;
        }
#pragma unroll 1
        for (int e = column; e < column + width; ++e) {
          const bool valid = has_line && e < own_columns;
          if constexpr (sizeof(T) >= 4) {
            device::copy_async<static_cast<int>(sizeof(T))>(to + e, source + e, valid);
          } else {
            to[e] = valid ? source[e] : T{};
          }
        }
      }
    }
  }

 private:
  int32_t line_[rows / rows_at_once];

  __device__ __forceinline__ static int own_row() { return static_cast<int>(threadIdx.x) / neighbours; }
};

}  // namespace torchops::kernels::routed_ffn
