#pragma once

#include "core/cpu/simd.h"

// Matrix products in registers. The left operand's elements are broadcast one by one, from any place; the
// right one is read in vectors along its columns. Columns come in panels of panel_columns: right operands
// that a kernel packs are [ceil(columns / panel_columns)][depth][panel_columns].
//
// An element is a float, a double, or a pair of bfloat16 neighbours along the depth, which one instruction
// multiplies and adds up.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

struct bfloat16_pair {
  uint16_t first;
  uint16_t second;
};

// Rows and vectors of columns of the tile of sums that stays in registers: 4 x 4 fill half of AVX-512's 32,
// 4 x 3 most of the 16 of the other levels.
inline constexpr int tile_rows = 4;
inline constexpr int tile_vectors = vector_bytes == 64 ? 4 : 3;
template <typename Sum>
inline constexpr int panel_columns = tile_vectors * (vector_bytes / static_cast<int>(sizeof(Sum)));

template <typename Element>
struct element {
  using sum = Element;
  using vector = vec<Element>;
  // Numbers that an element holds along the depth.
  static constexpr int depth = 1;
};
template <>
struct element<bfloat16_pair> {
  using sum = float;
  using vector = vuint;
  static constexpr int depth = 2;
};
template <typename Element>
using sum_t = typename element<Element>::sum;

template <typename Element>
inline vec<Element> multiply_add(Element a, vec<Element> b, vec<Element> sum) {
  return sum + a * b;
}
template <typename Vector>
inline Vector multiply_add_lanes(Vector a, Vector b, Vector sum) {
  return sum + a * b;
}

#if defined(__AVX512BF16__)
inline vfloat multiply_add_lanes(vuint a, vuint b, vfloat sum) {
  return bit_cast<vfloat>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
inline vfloat multiply_add(bfloat16_pair a, vuint b, vfloat sum) {
  return multiply_add_lanes(vuint{} + bit_cast<uint32_t>(a), b, sum);
}
#endif

#if defined(__AVX512BF16__)
// Neighbours as pairs: the numbers of `first`, then those of `second`, rounded to bfloat16.
inline void store_pairs(bfloat16_pair* to, vfloat first, vfloat second) {
  const auto pairs = _mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}

// Pairs of one number of `first` and one of `second`, rounded to bfloat16.
inline void store_interleaved(bfloat16_pair* to, vfloat first, vfloat second) {
  using Halfwords = vec<uint16_t>;
  Halfwords order;
  for (int lane = 0; lane < lanes<float>; ++lane) {
    order[2 * lane] = static_cast<uint16_t>(lane);
    order[2 * lane + 1] = static_cast<uint16_t>(lanes<float> + lane);
  }
  const auto both = bit_cast<Halfwords>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
  const Halfwords pairs = __builtin_shuffle(both, order);
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}
#endif

// An operand: element (i, d) lies at data[i * stride + d * step].
template <typename Element>
struct Operand {
  const Element* data;
  int64_t stride;
  int64_t step;
};

// sum[i][v] = sum over d in 0..depth-1, in ascending order, of left(i, d) * right(d, vector v of the columns),
// for so many rows i; right.stride separates its rows d.
template <int rows, int vectors, typename Element>
inline __attribute__((always_inline)) void product_tile(Operand<Element> left, const Element* right,
                                                        int64_t right_stride, int64_t depth,
                                                        vec<sum_t<Element>> (&sum)[rows][vectors]) {
  constexpr int lane_count = vector_bytes / static_cast<int>(sizeof(Element));
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) {
      sum[row][v] = vec<sum_t<Element>>{};
    }
  }
  const Element* a = left.data;
  for (int64_t d = 0; d < depth; ++d, a += left.step, right += right_stride) {
    typename element<Element>::vector b[vectors];
    for (int v = 0; v < vectors; ++v) {
      __builtin_memcpy(&b[v], right + v * lane_count, sizeof(b[v]));
    }
    for (int row = 0; row < rows; ++row) {
      for (int v = 0; v < vectors; ++v) {
        sum[row][v] = multiply_add(a[row * left.stride], b[v], sum[row][v]);
      }
    }
  }
}

template <int number>
struct count {
  static constexpr int value = number;
};

// Calls body(count<n>{}) for an n of 1..tile_vectors that is known when it runs.
template <typename Body>
inline __attribute__((always_inline)) void with_vectors(int64_t n, const Body& body) {
  switch (n) {
    case 1:
      return body(count<1>{});
    case 2:
      return body(count<2>{});
    case 3:
      return body(count<3>{});
    default:
      return body(count<tile_vectors>{});
  }
}

// left [num_rows, depth] times the columns of `vectors` vectors of right [depth, ...], where num_rows is a
// multiple of tile_rows. finish(row, sums) takes the sums of a row.
template <int vectors, typename Element, typename Finish>
inline __attribute__((always_inline)) void columns_product(int64_t num_rows, int64_t depth, Operand<Element> left,
                                                           const Element* right, int64_t right_stride,
                                                           const Finish& finish) {
  for (int64_t first = 0; first < num_rows; first += tile_rows) {
    vec<sum_t<Element>> sum[tile_rows][vectors];
    product_tile({left.data + first * left.stride, left.stride, left.step}, right, right_stride, depth, sum);
    for (int row = 0; row < tile_rows; ++row) {
      finish(first + row, sum[row]);
    }
  }
}

// The same with one panel.
template <typename Element, typename Finish>
inline __attribute__((always_inline)) void panel_product(int64_t num_rows, int64_t depth, Operand<Element> left,
                                                         const Element* panel, const Finish& finish) {
  columns_product<tile_vectors>(num_rows, depth, left, panel, panel_columns<sum_t<Element>>, finish);
}

// The same with num_vectors vectors of columns: finish(row, vector, sums) takes a few of them, from `vector` on.
template <typename Element, typename Finish>
inline __attribute__((always_inline)) void matrix_product(int64_t num_rows, int64_t num_vectors, int64_t depth,
                                                          Operand<Element> left, const Element* right,
                                                          int64_t right_stride, const Finish& finish) {
  constexpr int lane_count = vector_bytes / static_cast<int>(sizeof(Element));
  for (int64_t vector = 0; vector < num_vectors; vector += tile_vectors) {
    const int64_t vectors_left = num_vectors - vector;
    with_vectors(vectors_left < tile_vectors ? vectors_left : tile_vectors, [&](auto vectors) {
      columns_product<decltype(vectors)::value>(num_rows, depth, left, right + vector * lane_count, right_stride,
                                                [&](int64_t row, auto& sums) { finish(row, vector, sums); });
    });
  }
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
