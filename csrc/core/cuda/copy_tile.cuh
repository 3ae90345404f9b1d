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
  constexpr int stride = tile_stride<T, columns>;
  const T* source = from.data + first * from.row_stride;
  if (wide) {
    // Eight neighbours copy 128 bytes of a row.
    constexpr int width = static_cast<int>(16 / sizeof(T)), neighbours = 8, rows_at_once = threads / neighbours;
    static_assert(rows % rows_at_once == 0 && columns % (neighbours * width) == 0);
    const int own_row = static_cast<int>(threadIdx.x) / neighbours;
    const int own_column = static_cast<int>(threadIdx.x) % neighbours * width;
    T* target = tile + own_row * stride + own_column;
    source += own_row * from.row_stride + own_column;
#pragma unroll
    for (int row = 0; row < rows; row += rows_at_once) {
      const bool inside = own_row + row < end - first;
#pragma unroll
      for (int column = 0; column < columns; column += neighbours * width) {
        copy_async<16>(target + row * stride + column, source + column, inside && own_column + column < from.size);
      }
      source += rows_at_once * from.row_stride;
    }
    return;
  }
#pragma unroll 1
  for (int unit = static_cast<int>(threadIdx.x); unit < rows * columns; unit += threads) {
    const int row = unit / columns, column = unit % columns;
    const bool valid = row < end - first && column < from.size;
    const T* element = source + row * from.row_stride + column;
    if constexpr (sizeof(T) >= 4) {
      copy_async<static_cast<int>(sizeof(T))>(tile + row * stride + column, element, valid);
    } else {
      tile[row * stride + column] = valid ? *element : T{};
    }
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
