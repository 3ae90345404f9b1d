#pragma once

#include "core/cuda/device.cuh"

// Tiles of rows between global and shared memory.

namespace torchops::device {

// Rows of a tile lie 16 bytes further apart than they are long, so that the eight rows that are read at once
// lie in different banks.
template <typename T, int columns>
inline constexpr int tile_stride = columns + static_cast<int>(16 / sizeof(T));

template <typename T, int rows, int columns>
inline constexpr size_t tile_bytes = shared_size<T>(rows * tile_stride<T, columns>);

// Elements of a global matrix: row r begins at data + r * row_stride and has `size` of them.
template <typename T>
struct MatrixRows {
  T* data;
  int64_t row_stride;
  int size;
};

// Starts to copy rows first, first + 1, ... into a tile [rows, tile_stride]. Zeros stand for rows from `end` on,
// which are not read, and for columns behind `size`. With `wide`, 16 bytes at a time: rows begin at such multiples
// and `size` fills them. All `threads` of the block call it, wait, and meet at a barrier.
template <int rows, int columns, int threads, typename T>
__device__ __forceinline__ void copy_tile_async(T* tile, const MatrixRows<const T>& from, int first, int end,
                                                bool wide) {
  // Eight neighbours copy 128 bytes of a row.
  constexpr int width = static_cast<int>(16 / sizeof(T)), neighbours = 8, rows_at_once = threads / neighbours;
  static_assert(rows % rows_at_once == 0 && columns % (neighbours * width) == 0);
  const int own_row = static_cast<int>(threadIdx.x) / neighbours;
  const int own_column = static_cast<int>(threadIdx.x) % neighbours * width;
  T* target = tile + own_row * tile_stride<T, columns> + own_column;
  const T* source = from.data + (first + own_row) * from.row_stride + own_column;
  const int own_rows = end - first - own_row, own_columns = from.size - own_column;
#pragma unroll
  for (int row = 0; row < rows; row += rows_at_once) {
#pragma unroll
    for (int column = 0; column < columns; column += neighbours * width) {
      T* to = target + row * tile_stride<T, columns> + column;
      if (wide) {
        copy_async<16>(to, source + column, row < own_rows && column < own_columns);
        continue;
      }
#pragma unroll 1
      for (int e = 0; e < width; ++e) {
        const bool valid = row < own_rows && column + e < own_columns;
        if constexpr (sizeof(T) >= 4) {
          copy_async<static_cast<int>(sizeof(T))>(to + e, source + column + e, valid);
        } else {
          to[e] = valid ? source[column + e] : T{};
        }
      }
    }
    source += rows_at_once * from.row_stride;
  }
}

// The other way: rows of a tile that all have written become rows first, first + 1, ... below `end`.
template <int rows, int columns, int threads, typename T>
__device__ __forceinline__ void store_tile(const T* tile, const MatrixRows<T>& to, int first, int end, bool wide) {
  struct alignas(16) Chunk {
    T element[16 / sizeof(T)];
  };
  T* rows_to = to.data + first * to.row_stride;
  const int width = wide ? static_cast<int>(16 / sizeof(T)) : 1;
  const int per_row = columns / width;
#pragma unroll 1
  for (int unit = static_cast<int>(threadIdx.x); unit < rows * per_row; unit += threads) {
    const int row = unit / per_row, column = unit % per_row * width;
    if (first + row < end && column < to.size) {
      const T* element = tile + row * tile_stride<T, columns> + column;
      T* target = rows_to + row * to.row_stride + column;
      if (wide) {
        *reinterpret_cast<Chunk*>(target) = *reinterpret_cast<const Chunk*>(element);
      } else {
        *target = *element;
      }
    }
  }
}

}  // namespace torchops::device
