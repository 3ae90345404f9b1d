#pragma once

#include <type_traits>
#include <utility>

#include "core/attention/cpu/tiles.h"

// The rows of a tensor as operands of matrix products. rows(i) is where row i lies, or null for one that zeros stand
// for: what no query sees, resp. what sees no key, must not be multiplied, not even by 0.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// Rows one behind the other, of which `used` are read.
template <typename T>
struct RowsInOrder {
  const T* data;
  int64_t stride;
  attention::Range used;

  const T* operator()(int64_t row) const { return used.contains(row) ? data + row * stride : nullptr; }
};

// 16-bit numbers in the lower halves of 32 bits.
template <typename T>
vuint load_words(const T* from, int64_t used) {
  vhalfwords bits = {};
  if (used == lanes<T>) {
    __builtin_memcpy(&bits, from, sizeof(bits));
  } else {
    __builtin_memcpy(&bits, from, static_cast<size_t>(used) * sizeof(T));
  }
  return widen_words(bits);
}
template <typename E>
void store_words(E* to, vuint words) {
  __builtin_memcpy(to, &words, sizeof(words));
}

template <typename Rows>
using number_of = std::remove_cvref_t<decltype(*std::declval<const Rows&>()(0))>;

// rows [count, size] -> packed [count, stride] of numbers, padded with zeros.
template <typename Rows, typename A>
void pack_numbers(const Rows& rows, int64_t size, int64_t count, int64_t stride, A* packed) {
  for (int64_t row = 0; row < count; ++row, packed += stride) {
    int64_t filled = 0;
    if (const auto* const from = rows(row); from != nullptr) {
      for_each_vector<number_of<Rows>>(size, [&](int64_t d, int lanes_used) {
        store_piece(packed + d, load_piece(from + d, lanes_used), lanes_used);
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
template <typename E, typename Rows>
void pack_left(const Rows& rows, int64_t size, int64_t count, E* packed) {
  const int64_t stride = left_stride<E>(size);
  if constexpr (is_pair<E>) {
    for (int64_t row = 0; row < count; ++row) {
      E* const to = packed + row * stride;
      if (const auto* const from = rows(row); from != nullptr) {
        to[stride - 1] = E{};
        __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(*from));
      } else {
        __builtin_memset(to, 0, static_cast<size_t>(stride) * sizeof(E));
      }
    }
  } else {
    pack_numbers(rows, size, count, stride, packed);
  }
}

// A right operand whose depth is along the columns, the rows one below the other:
// [count, size] -> [depth_of(count), columns_of(size)].
template <typename E, typename Rows>
void pack_right(const Rows& rows, int64_t size, int64_t count, E* packed) {
  const int64_t columns = columns_of<E>(size);
  if constexpr (is_pair<E>) {
    using T = number_of<Rows>;
    for (int64_t row = 0; row < count; row += 2, packed += columns) {
      const T* const first = rows(row);
      const T* const second = rows(row + 1);
      for (int64_t d = 0; d < columns; d += lanes<T>) {
        const int64_t left = size - d < lanes<T> ? size - d : lanes<T>;
        const vuint upper = second != nullptr ? load_words(second + d, left) : vuint{};
        const vuint lower = first != nullptr ? load_words(first + d, left) : vuint{};
        store_words(packed + d, lower | upper << 16);
      }
    }
  } else {
    pack_numbers(rows, size, count, columns, packed);
  }
}

// A right operand whose columns are the rows: [count, size] -> panels [columns / panel][depth_of(size)][panel],
// `columns` a multiple of the panel.
template <typename E, typename Rows>
void pack_transposed(const Rows& rows, int64_t size, int64_t columns, E* packed) {
  constexpr int64_t panel = panel_columns<sum_t<E>>;
  constexpr int64_t side = lane_count<E>;
  const int64_t depth = depth_of<E>(size);
  for (int64_t column = 0; column < columns; column += side) {
    const number_of<Rows>* from[side];
    for (int64_t row = 0; row < side; ++row) {
      from[row] = rows(column + row);
    }
    E* const to = packed + column / panel * panel * depth + column % panel;
    for (int64_t first = 0; first < depth; first += side) {
      const int64_t left = size - first * element<E>::depth;
      typename element<E>::vector square[side];
      for (int64_t row = 0; row < side; ++row) {
        square[row] = from[row] != nullptr ? load_elements<E>(from[row] + first * element<E>::depth, left)
                                           : typename element<E>::vector{};
      }
      transpose(square);
      for (int64_t d = 0; d < side && first + d < depth; ++d) {
        __builtin_memcpy(to + (first + d) * panel, &square[d], sizeof(square[d]));
      }
    }
  }
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
