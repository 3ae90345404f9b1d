#pragma once

#include "core/cpu/dense_product_kernel.h"
#include "core/cpu/elements.h"
#include "core/cpu/lines.h"

// Blocks of matrices as operands of matrix products, padded with zeros.

namespace torchops::kernels::core::TORCHOPS_LEVEL {

template <typename T>
bool lines_are_rows(const Matrices<T>& matrices) {
  return matrices.column_stride == 1;
}

// The block of a matrix that begins at [row, column].
template <typename T>
Lines<T> lines_of(const Matrices<T>& matrices, int64_t batch, int64_t row, int64_t column) {
  const bool are_rows = lines_are_rows(matrices);
  const Lines<T> lines{matrices.data + batch * matrices.batch_stride,
                       are_rows ? matrices.row_stride : matrices.column_stride, matrices.lines};
  return are_rows ? lines.from(row, column) : lines.from(column, row);
}

// Rows and vectors of columns of the sums that stay in registers: with 32 of these 8 x 3, of which each number that is
// read serves more products than of 4 x 4. Pairs come from two vectors at a time, which three are not.
template <typename E>
inline constexpr int strip_rows = vector_bytes == 64 && !is_pair<E> ? 8 : tile_rows;
template <typename E>
inline constexpr int strip_columns =
    (vector_bytes == 64 && !is_pair<E> ? 3 : tile_vectors) * (vector_bytes / static_cast<int>(sizeof(E)));

template <typename E>
inline void store_elements(E* to, typename element<E>::vector elements) {
  __builtin_memcpy(to, &elements, sizeof(elements));
}

// sum + a * b, where every lane is an element.
template <typename E>
inline vec<sum_t<E>> multiply_add_lanes(typename element<E>::vector a, typename element<E>::vector b,
                                        vec<sum_t<E>> sum) {
#if defined(__AVX512BF16__)
  if constexpr (is_pair<E>) {
    return bit_cast<vfloat>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }
#endif
  if constexpr (!is_pair<E>) {
    return sum + a * b;
  }
}

#if defined(__AVX512BF16__)
// The pairs of the lanes of two rows of bfloat16.
inline void interleave(vuint first, vuint second, vuint (&pairs)[2]) {
  using Halfwords = vec<uint16_t>;
  constexpr int size = sizeof(Halfwords) / sizeof(uint16_t);
  for (int half = 0; half < 2; ++half) {
    Halfwords order;
    for (int lane = 0; lane < size; ++lane) {
      order[lane] = static_cast<uint16_t>(half * size / 2 + lane / 2 + lane % 2 * size);
    }
    pairs[half] = bit_cast<vuint>(__builtin_shuffle(bit_cast<Halfwords>(first), bit_cast<Halfwords>(second), order));
  }
}
#endif

// `count` rows of `size` numbers along the depth -> [padded_count][stride], zeros behind.
template <typename E, typename T>
void pack_rows(Lines<T> from, int64_t count, int64_t size, int64_t padded_count, int64_t stride, E* packed) {
  for (int64_t row = 0; row < padded_count; ++row, packed += stride) {
    int64_t d = 0;
    if (row < count) {
      const T* const line = from[row];
      for (; d * element<E>::depth < size; d += lane_count<E>) {
        const auto elements = load_elements<E>(line + d * element<E>::depth, size - d * element<E>::depth);
        const int64_t left = stride - d;
        __builtin_memcpy(packed + d, &elements, static_cast<size_t>(smaller(left, lane_count<E>)) * sizeof(E));
      }
    }
    for (; d < stride; ++d) {
      packed[d] = E{};
    }
  }
}

// The elements of one depth for as many columns as a vector of T has: of one row of numbers, or of two rows whose
// neighbours make pairs, the second one null behind the depth. `used` columns are left.
template <typename E, typename T>
inline __attribute__((always_inline)) void load_across(const T* row, const T* next, int64_t used,
                                                       typename element<E>::vector (&elements)[element<E>::depth]) {
  if constexpr (is_pair<E>) {
    interleave(load_elements<E>(row, used), next == nullptr ? vuint{} : load_elements<E>(next, used), elements);
  } else {
    elements[0] = load_elements<E>(row, used);
  }
}
// Columns that load_across takes.
template <typename E>
inline constexpr int64_t columns_across = lane_count<E> * element<E>::depth;

// Rows one below the other along the depth, [size, count] -> [groups][depth_of(size)][group], with zeros behind the
// columns. A group is a multiple of columns_across.
template <int64_t group, typename E, typename T>
void pack_across(Lines<T> from, int64_t size, int64_t count, E* packed) {
  const int64_t depth = depth_of<E>(size);
  // A few rows at a time: then whole lines are written, and few pages are read by turns.
  constexpr int64_t rows_at_once = 8;
  for (int64_t first = 0; first < depth; first += rows_at_once) {
    const int64_t end = smaller(first + rows_at_once, depth);
    for (int64_t column = 0; column < count; column += columns_across<E>) {
      E* const to = packed + column / group * group * depth + column % group;
      for (int64_t d = first; d < end; ++d) {
        const int64_t row = d * element<E>::depth;
        typename element<E>::vector elements[element<E>::depth];
        load_across<E>(from[row] + column, row + 1 < size ? from[row + 1] + column : nullptr, count - column, elements);
        __builtin_memcpy(to + d * group, elements, sizeof(elements));
      }
    }
  }
}

// A block of the left operand, [count, size], in strips of strip_rows rows that product_tile reads: as the rows lie,
// or, where the depth lies across them, in groups of rows [depth][group].
template <typename E>
struct LeftBlock {
  static constexpr int64_t group = columns_across<E> < strip_rows<E> ? strip_rows<E> : columns_across<E>;

  E* data;
  int64_t depth = 0;  // in elements
  bool in_groups = false;

  static int64_t elements(int64_t count, int64_t size) { return round_up(count, group) * depth_of<E>(size); }

  Operand<E> strip(int64_t row) const {
    return in_groups ? Operand<E>{data + row / group * group * depth + row % group, 1, group}
                     : Operand<E>{data + row * depth, depth, 1};
  }

  // Of `count` rows of `size` numbers, which are lines, or lie across them.
  template <typename T>
  void pack(Lines<T> from, bool lines_are_rows, int64_t count, int64_t size) {
    depth = depth_of<E>(size);
    in_groups = !lines_are_rows;
    if (in_groups) {
      pack_across<group>(from, size, count, data);
    } else {
      pack_rows(from, count, size, round_up(count, strip_rows<E>), depth, data);
    }
  }
};

// A block of the right operand, [size, count], whose rows or columns are lines -> [depth_of(size)][strip_columns].
template <typename E, typename T>
void pack_panel(Lines<T> from, bool lines_are_rows, int64_t size, int64_t count, E* packed) {
  constexpr int64_t panel = strip_columns<E>;
  constexpr int64_t side = lane_count<E>;
  if (lines_are_rows) {
    pack_across<panel>(from, size, count, packed);
    return;
  }
  const int64_t depth = depth_of<E>(size);
  for (int64_t column = 0; column < count; column += side) {
    for (int64_t first = 0; first < depth; first += side) {
      const int64_t used = size - first * element<E>::depth;
      typename element<E>::vector square[side];
      for (int64_t row = 0; row < side; ++row) {
        square[row] = column + row < count ? load_elements<E>(from[column + row] + first * element<E>::depth, used)
                                           : typename element<E>::vector{};
      }
      transpose(square);
      for (int64_t d = 0; d < side && first + d < depth; ++d) {
        store_elements(packed + (first + d) * panel + column, square[d]);
      }
    }
  }
}

}  // namespace torchops::kernels::core::TORCHOPS_LEVEL
