#pragma once

#include "core/cpu/simd.h"
#include "stf/cpu/lane_tables.h"
#include "stf/packed_factor.h"

// How kernels read a packed factor: a column of a group is a mask, and a value for each of its bits.

namespace torchops::kernels::stf::TORCHOPS_LEVEL {

// 16 rows in vectors.
template <typename A>
struct RowGroup {
  static constexpr int vectors = static_cast<int>(rows_per_group) / lanes<A>;

  vec<A> part[vectors];
};

// The next values spread over the rows that the mask names, zeros elsewhere. It may read up to 15 values more
// than it takes.
template <typename A>
inline __attribute__((always_inline)) RowGroup<A> spread(const A* values, uint32_t mask) {
  RowGroup<A> rows;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == sizeof(float)) {
    rows.part[0] =
        bit_cast<vec<A>>(_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), bit_cast<__m512>(load(values))));
    return rows;
  } else {
    const auto low = static_cast<__mmask8>(mask & 0xff);
    rows.part[0] = bit_cast<vec<A>>(_mm512_maskz_expand_pd(low, bit_cast<__m512d>(load(values))));
    rows.part[1] = bit_cast<vec<A>>(_mm512_maskz_expand_pd(static_cast<__mmask8>(mask >> 8),
                                                           bit_cast<__m512d>(load(values + __builtin_popcount(low)))));
    return rows;
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(A) == sizeof(float)) {
    const uint32_t low = mask & 0xff;
    rows.part[0] = spread_8(values, low);
    rows.part[1] = spread_8(values + __builtin_popcount(low), mask >> 8);
    return rows;
  }
#endif
  A spread_out[rows_per_group];
  for (int64_t row = 0; row < rows_per_group; ++row) {
    const bool there = mask >> row & 1;
    spread_out[row] = there ? *values : A(0);
    values += there;
  }
  __builtin_memcpy(&rows, spread_out, sizeof(rows));
  return rows;
#endif
}

// Numbers that group_values may write.
template <typename T>
int64_t group_scratch(const PackedFactor<T>& factor) {
  return (factor.row_size() + 1) * rows_per_group;
}

// A group's values as they are computed with, with readable memory behind them.
template <typename T>
const accumulate_t<T>* group_values(const PackedFactor<T>& factor, int64_t group, accumulate_t<T>* scratch) {
  const int64_t size = factor.row_size() * rows_per_group;
  const T* const values = factor.values + group * size;
  if constexpr (sizeof(T) == sizeof(accumulate_t<T>)) {
    if (group + 1 < factor.num_groups() && size >= rows_per_group) {
      return values;
    }
  }
  for_each_vector<T>(size,
                     [&](int64_t at, int used) { store_piece(scratch + at, load_piece(values + at, used), used); });
  return scratch;
}

// Whether each block of a group has 16 * nnz bits, as many as there are values.
template <typename T>
bool counts_are_right(const PackedFactor<T>& factor, int64_t group) {
  const uint16_t* mask = factor.mask + group * factor.num_blocks * factor.basis_size;
  for (int64_t block = 0; block < factor.num_blocks; ++block) {
    int64_t count = 0, column = 0;
    for (; column + 4 <= factor.basis_size; column += 4) {
      uint64_t four;
      __builtin_memcpy(&four, mask + column, sizeof(four));
      count += __builtin_popcountll(four);
    }
    for (; column < factor.basis_size; ++column) {
      count += __builtin_popcount(mask[column]);
    }
    mask += factor.basis_size;
    if (count != rows_per_group * factor.nnz) {
      return false;
    }
  }
  return true;
}

// The nonzeros of a group's block as lists of values and columns, one for each of the 16 rows and `stride` apart.
// False if a row does not have nnz of them; no more are written.
template <typename A>
bool list_rows(const A* values, const uint16_t* mask, int64_t basis_size, int64_t nnz, A* to, uint16_t* columns,
               int64_t stride) {
  int64_t size[rows_per_group] = {};
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == sizeof(float)) {
    // A square of 16 columns is turned, and what stands in a row pushed together.
    for (int64_t first = 0; first < basis_size; first += rows_per_group) {
      const int64_t left = basis_size - first;
      uint16_t rows_of_column[rows_per_group] = {};
      __builtin_memcpy(rows_of_column, mask + first,
                       static_cast<size_t>(left < rows_per_group ? left : rows_per_group) * sizeof(uint16_t));
      vec<A> square[rows_per_group];
      for (int column = 0; column < rows_per_group; ++column) {
        square[column] = spread(values, rows_of_column[column]).part[0];
        values += __builtin_popcount(rows_of_column[column]);
      }
      transpose(square);
      __m256i bits;
      __builtin_memcpy(&bits, rows_of_column, sizeof(bits));
      const auto numbers = bit_cast<__m512i>(lane_numbers<int32_t>() + static_cast<int32_t>(first));
#pragma GCC unroll 16
      for (int row = 0; row < rows_per_group; ++row) {
        const __mmask16 there =
            _mm256_movepi16_mask(_mm256_slli_epi16(bits, static_cast<int>(rows_per_group) - 1 - row));
        const int count = __builtin_popcount(there);
        if (size[row] + count > nnz) {
          return false;
        }
        const auto used = static_cast<__mmask16>((1u << count) - 1);
        const int64_t at = row * stride + size[row];
        _mm512_mask_storeu_ps(to + at, used, _mm512_maskz_compress_ps(there, bit_cast<__m512>(square[row])));
        _mm256_mask_storeu_epi16(columns + at, used,
                                 _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_compress_epi32(there, numbers)));
        size[row] += count;
      }
    }
  } else
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == sizeof(float)) {
    // The same with 8 columns, in two squares.
    constexpr int width = lanes<float>;
    for (int64_t first = 0; first < basis_size; first += width) {
      const int64_t left = basis_size - first;
      uint16_t rows_of_column[width] = {};
      __builtin_memcpy(rows_of_column, mask + first,
                       static_cast<size_t>(left < width ? left : width) * sizeof(uint16_t));
      vec<A> squares[2][width];
      for (int column = 0; column < width; ++column) {
        const RowGroup<A> rows = spread(values, rows_of_column[column]);
        squares[0][column] = rows.part[0];
        squares[1][column] = rows.part[1];
        values += __builtin_popcount(rows_of_column[column]);
      }
      transpose(squares[0]);
      transpose(squares[1]);
      __m128i bits;
      __builtin_memcpy(&bits, rows_of_column, sizeof(bits));
#pragma GCC unroll 16
      for (int row = 0; row < rows_per_group; ++row) {
        const __m128i highest = _mm_slli_epi16(bits, static_cast<int>(rows_per_group) - 1 - row);
        const auto there = static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(highest, _mm_setzero_si128())));
        const int count = __builtin_popcount(there);
        const int64_t room = nnz - size[row];
        if (count > room) {
          return false;
        }
        const int64_t at = row * stride + size[row];
        const vec<float> numbers = push_together(squares[row / width][row % width], there);
        const vhalfwords columns_there = numbers_of_lanes(there, first);
        if (room >= width) {  // what stands behind them is written over later
          store(to + at, numbers);
          __builtin_memcpy(columns + at, &columns_there, sizeof(columns_there));
        } else {
          store_partial(to + at, numbers, count);
          __builtin_memcpy(columns + at, &columns_there, static_cast<size_t>(count) * sizeof(uint16_t));
        }
        size[row] += count;
      }
    }
  } else
#endif
  {
    for (int64_t column = 0; column < basis_size; ++column) {
      for (uint32_t rows = mask[column]; rows != 0; rows &= rows - 1) {
        const int row = __builtin_ctz(rows);
        if (size[row] == nnz) {
          return false;
        }
        const int64_t at = row * stride + size[row]++;
        to[at] = *values++;
        columns[at] = static_cast<uint16_t>(column);
      }
    }
  }
  bool right = true;
  for (const int64_t count : size) {
    right &= count == nnz;
  }
  return right;
}

// Appends a column's values, and the numbers of the rows that have them, counted from first_row on, to lists that have
// room for so many. Returns how many there are; `end` is behind the factor's last value.
template <typename T>
inline __attribute__((always_inline)) int append_column(const T* values, [[maybe_unused]] const T* end, uint32_t mask,
                                                        int64_t first_row, accumulate_t<T>* to, uint16_t* rows,
                                                        [[maybe_unused]] int64_t room) {
  const int count = __builtin_popcount(mask);
#if defined(__AVX512F__)
  if constexpr (sizeof(accumulate_t<T>) == sizeof(float)) {
    const auto used = static_cast<__mmask16>((1u << count) - 1);
    const vec<float> numbers = values + lanes<T> <= end ? load(values) : load_partial(values, count);
    _mm512_mask_storeu_ps(to, used, bit_cast<__m512>(numbers));
    const auto row = bit_cast<__m512i>(lane_numbers<int32_t>() + static_cast<int32_t>(first_row));
    _mm256_mask_storeu_epi16(
        rows, used,
        _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), row)));
    return count;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(accumulate_t<T>) == sizeof(float)) {
    if (room >= rows_per_group && values + rows_per_group <= end) {  // what stands behind them is written over later
      constexpr int width = lanes<float>;
      store(to, load(values));
      store(to + width, load(values + width));
      const uint32_t low = mask & 0xff;
      const vhalfwords low_rows = numbers_of_lanes(low, first_row);
      const vhalfwords high_rows = numbers_of_lanes(mask >> width, first_row + width);
      __builtin_memcpy(rows, &low_rows, sizeof(low_rows));
      __builtin_memcpy(rows + __builtin_popcount(low), &high_rows, sizeof(high_rows));
      return count;
    }
  }
#endif
  for_each_vector<T>(count, [&](int64_t at, int used) { store_piece(to + at, load_piece(values + at, used), used); });
  for (int i = 0; i < count; ++i, mask &= mask - 1) {
    rows[i] = static_cast<uint16_t>(first_row + __builtin_ctz(mask));
  }
  return count;
}

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
