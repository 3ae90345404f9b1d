#pragma once

#include "core/cpu/arena.h"
#include "core/cpu/matrix_product.h"
#include "span_attention/attention.h"

// What the CPU's kernels share: the tiles that queries and keys are cut into, and how the rows of a tensor
// are packed as operands of matrix products.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

// What a dtype is multiplied as.
template <typename T>
struct multiplicand {
  using type = accumulate_t<T>;
};
#if defined(__AVX512BF16__)
template <>
struct multiplicand<bfloat16> {
  using type = bfloat16_pair;
};
#endif
template <typename T>
using multiplicand_t = typename multiplicand<T>::type;

template <typename E>
inline constexpr bool is_pair = element<E>::depth == 2;

template <typename E>
inline constexpr int64_t lane_count = vector_bytes / static_cast<int64_t>(sizeof(sum_t<E>));

// Tiles begin at multiples of their size, whatever is visible: then results do not depend on how the work
// is split.
inline constexpr int64_t query_tile = 64;
// About as many keys, whole panels and whole tiles of registers: 64, or 72 where panels have 6, 12 or 24.
template <typename E>
inline constexpr int64_t key_tile = 64 % panel_columns<sum_t<E>> == 0 ? 64 : 72;
static_assert(key_tile<float> % panel_columns<float> == 0 && key_tile<double> % panel_columns<double> == 0);
static_assert(query_tile % tile_rows == 0 && key_tile<float> % tile_rows == 0 && key_tile<double> % tile_rows == 0);

constexpr int64_t tiles_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}
constexpr int64_t round_up(int64_t count, int64_t unit) {
  return tiles_of(count, unit) * unit;
}

// First and last tiles by turns: where later queries see more keys, every stretch of turns costs the same.
constexpr int64_t balanced_tile(int64_t turn, int64_t num_tiles) {
  return turn % 2 == 0 ? turn / 2 : num_tiles - 1 - turn / 2;
}

// Elements that hold `size` numbers along the depth.
template <typename E>
constexpr int64_t depth_of(int64_t size) {
  return tiles_of(size, element<E>::depth);
}
// Columns of a right operand: whole vectors.
template <typename E>
constexpr int64_t columns_of(int64_t size) {
  return round_up(size, vector_bytes / static_cast<int64_t>(sizeof(E)));
}

// ---- packing ------------------------------------------------------------------------------------

// A vector of elements of a row, of which `used` numbers are left.
template <typename E, typename T>
typename element<E>::vector load_elements(const T* from, int64_t used) {
  if constexpr (is_pair<E>) {
    vuint words = {};
    if (used >= 2 * lane_count<E>) {
      __builtin_memcpy(&words, from, sizeof(words));
    } else {
      __builtin_memcpy(&words, from, static_cast<size_t>(used) * sizeof(T));
    }
    return words;
  } else {
    return load_piece(from, static_cast<int>(used < lanes<T> ? used : lanes<T>));
  }
}

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

// rows [count, size] -> packed [padded_count, stride] of numbers, padded with zeros.
template <typename T>
void pack_numbers(const T* rows, int64_t row_stride, int64_t count, int64_t size, int64_t padded_count, int64_t stride,
                  accumulate_t<T>* packed) {
  for (int64_t row = 0; row < padded_count; ++row, packed += stride) {
    int64_t filled = 0;
    if (row < count) {
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

// A left operand whose depth is along the rows: [count, size] -> [padded_count, left_stride(size)].
template <typename E>
constexpr int64_t left_stride(int64_t size) {
  return is_pair<E> ? depth_of<E>(size) : columns_of<E>(size);
}
template <typename E, typename T>
void pack_left(const T* rows, int64_t row_stride, int64_t count, int64_t size, int64_t padded_count, E* packed) {
  const int64_t stride = left_stride<E>(size);
  if constexpr (is_pair<E>) {
    for (int64_t row = 0; row < padded_count; ++row) {
      E* const to = packed + row * stride;
      to[stride - 1] = E{};
      if (row < count) {
        __builtin_memcpy(to, rows + row * row_stride, static_cast<size_t>(size) * sizeof(T));
      } else {
        __builtin_memset(to, 0, static_cast<size_t>(stride) * sizeof(E));
      }
    }
  } else {
    pack_numbers(rows, row_stride, count, size, padded_count, stride, packed);
  }
}

// A right operand whose depth is along the columns, the rows one below the other:
// [count, size] -> [depth_of(padded_count), columns_of(size)].
template <typename E, typename T>
void pack_right(const T* rows, int64_t row_stride, int64_t count, int64_t size, int64_t padded_count, E* packed) {
  const int64_t columns = columns_of<E>(size);
  if constexpr (is_pair<E>) {
    for (int64_t row = 0; row < padded_count; row += 2, packed += columns) {
      const T* const first = rows + row * row_stride;
      for (int64_t d = 0; d < columns; d += lanes<T>) {
        const int64_t used = size - d < lanes<T> ? size - d : lanes<T>;
        const vuint upper = row + 1 < count ? load_words(first + row_stride + d, used) : vuint{};
        const vuint lower = row < count ? load_words(first + d, used) : vuint{};
        store_words(packed + d, lower | upper << 16);
      }
    }
  } else {
    pack_numbers(rows, row_stride, count, size, padded_count, columns, packed);
  }
}

// A right operand whose columns are the rows: [count, size] -> panels [columns / panel][depth_of(size)][panel],
// `columns` a multiple of the panel.
template <typename E, typename T>
void pack_transposed(const T* rows, int64_t row_stride, int64_t count, int64_t size, int64_t columns, E* packed) {
  constexpr int64_t panel = panel_columns<sum_t<E>>;
  constexpr int64_t side = lane_count<E>;
  const int64_t depth = depth_of<E>(size);
  for (int64_t column = 0; column < columns; column += side) {
    E* const to = packed + column / panel * panel * depth + column % panel;
    for (int64_t first = 0; first < depth; first += side) {
      const int64_t used = size - first * element<E>::depth;
      typename element<E>::vector square[side];
      for (int64_t row = 0; row < side; ++row) {
        square[row] = column + row < count
                          ? load_elements<E>(rows + (column + row) * row_stride + first * element<E>::depth, used)
                          : typename element<E>::vector{};
      }
      transpose(square);
      for (int64_t d = 0; d < side && first + d < depth; ++d) {
        __builtin_memcpy(to + (first + d) * panel, &square[d], sizeof(square[d]));
      }
    }
  }
}

// ---- visibility of a tile -----------------------------------------------------------------------

// The keys that each row of a tile sees, where a tile is the same queries of one or several heads one behind
// the other; none for rows behind the last.
struct TileSpans {
  Range keys[query_tile];

  TileSpans(const Span& span, const Sequence& sequence, int64_t first_query, int64_t num_queries,
            int64_t num_heads = 1) {
    for (int64_t row = 0; row < query_tile; ++row) {
      keys[row] = row < num_queries               ? visible_keys(span, sequence, first_query + row)
                  : row < num_heads * num_queries ? keys[row - num_queries]
                                                  : Range{0, 0};
    }
  }

  // Whether every query sees all keys of [begin, end).
  bool all_visible(int64_t begin, int64_t end, int64_t num_rows) const {
    return keys[num_rows - 1].begin <= begin && end <= keys[0].end;
  }

  // Leaves the scores of what a query sees, in vectors from key `first` on, and makes the others -inf.
  template <typename A, int vectors>
  void hide(int64_t row, int64_t first, vec<A> (&scores)[vectors]) const {
    using Lane = typename lane_index<sizeof(A)>::type;
    constexpr int64_t lane_count = vector_bytes / static_cast<int64_t>(sizeof(A));
    const vec<A> hidden = broadcast(-static_cast<A>(__builtin_inf()));
    for (int v = 0; v < vectors; ++v) {
      const int64_t begin = detail::clamp(keys[row].begin - first - v * lane_count, 0, lane_count);
      const int64_t end = detail::clamp(keys[row].end - first - v * lane_count, 0, lane_count);
      const vec<Lane> lane = lane_numbers<Lane>();
      scores[v] = (lane >= static_cast<Lane>(begin)) & (lane < static_cast<Lane>(end)) ? scores[v] : hidden;
    }
  }
};

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
