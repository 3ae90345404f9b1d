#pragma once

#include "span_attention/cpu/tiles.h"

// The rows of a tensor as operands of matrix products. Zeros stand for those that are not among `used`, which are not
// read: what no query sees, resp. what sees no key, must not be multiplied, not even by 0.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

// 16-bit numbers in the lower halves of 32 bits.
template <typename T>
vuint load_words(const T* from, int64_t used) {
  vhalfwords bits = {};
  if (used == lanes<T>) {
    __builtin_memcpy(&bits, from, sizeof(bits));
  } else {
    __builtin_memcpy(&bits, from, static_cast<size_t>(used) * sizeof(T));
  }
  return __builtin_convertvector(bits, vuint);
}
template <typename E>
void store_words(E* to, vuint words) {
  __builtin_memcpy(to, &words, sizeof(words));
}

// rows [count, size] -> packed [count, stride] of numbers, padded with zeros.
template <typename T>
void pack_numbers(const T* rows, int64_t row_stride, Range used, int64_t size, int64_t count, int64_t stride,
                  accumulate_t<T>* packed) {
  for (int64_t row = 0; row < count; ++row, packed += stride) {
    int64_t filled = 0;
    if (used.contains(row)) {
      for_each_vector<T>(size, [&](int64_t d, int lanes_used) {
        store_piece(packed + d, load_piece(rows + row * row_stride + d, lanes_used), lanes_used);
      });
      filled = size;
    }
    for (; filled < stride; ++filled) {
      packed[filled] = 0;
    }
  }
}

// A left operand whose depth is along the rows: [count, size] -> [count, left_stride(size)].
template <typename E>
constexpr int64_t left_stride(int64_t size) {
  return is_pair<E> ? depth_of<E>(size) : columns_of<E>(size);
}
template <typename E, typename T>
void pack_left(const T* rows, int64_t row_stride, Range used, int64_t size, int64_t count, E* packed) {
  const int64_t stride = left_stride<E>(size);
  if constexpr (is_pair<E>) {
    for (int64_t row = 0; row < count; ++row) {
      E* const to = packed + row * stride;
      if (used.contains(row)) {
        to[stride - 1] = E{};
        __builtin_memcpy(to, rows + row * row_stride, static_cast<size_t>(size) * sizeof(T));
      } else {
        __builtin_memset(to, 0, static_cast<size_t>(stride) * sizeof(E));
      }
    }
  } else {
    pack_numbers(rows, row_stride, used, size, count, stride, packed);
  }
}

// A right operand whose depth is along the columns, the rows one below the other:
// [count, size] -> [depth_of(count), columns_of(size)].
template <typename E, typename T>
void pack_right(const T* rows, int64_t row_stride, Range used, int64_t size, int64_t count, E* packed) {
  const int64_t columns = columns_of<E>(size);
  if constexpr (is_pair<E>) {
    for (int64_t row = 0; row < count; row += 2, packed += columns) {
      const T* const first = rows + row * row_stride;
      for (int64_t d = 0; d < columns; d += lanes<T>) {
        const int64_t left = size - d < lanes<T> ? size - d : lanes<T>;
        const vuint upper = used.contains(row + 1) ? load_words(first + row_stride + d, left) : vuint{};
        const vuint lower = used.contains(row) ? load_words(first + d, left) : vuint{};
        store_words(packed + d, lower | upper << 16);
      }
    }
  } else {
    pack_numbers(rows, row_stride, used, size, count, columns, packed);
  }
}

// A right operand whose columns are the rows: [count, size] -> panels [columns / panel][depth_of(size)][panel],
// `columns` a multiple of the panel.
template <typename E, typename T>
void pack_transposed(const T* rows, int64_t row_stride, Range used, int64_t size, int64_t columns, E* packed) {
  constexpr int64_t panel = panel_columns<sum_t<E>>;
  constexpr int64_t side = lane_count<E>;
  const int64_t depth = depth_of<E>(size);
  for (int64_t column = 0; column < columns; column += side) {
    E* const to = packed + column / panel * panel * depth + column % panel;
    for (int64_t first = 0; first < depth; first += side) {
      const int64_t left = size - first * element<E>::depth;
      typename element<E>::vector square[side];
      for (int64_t row = 0; row < side; ++row) {
        square[row] = used.contains(column + row)
                          ? load_elements<E>(rows + (column + row) * row_stride + first * element<E>::depth, left)
                          : typename element<E>::vector{};
      }
      transpose(square);
      for (int64_t d = 0; d < side && first + d < depth; ++d) {
        __builtin_memcpy(to + (first + d) * panel, &square[d], sizeof(square[d]));
      }
    }
  }
}

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
