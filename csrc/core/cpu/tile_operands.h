#pragma once

#include "core/cpu/elements.h"
#include "core/cpu/lines.h"
#include "core/cpu/tile.h"

// Operands of products of tiles, and the products of blocks of 32 rows and 32 columns.
//
// A block of 16 rows and 32 numbers of the depth is a tile. Packed, its 512 numbers lie together: of a left operand row
// by row, of a right one as 16 rows of 16 pairs, one the transpose of the other.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

inline constexpr int64_t tile_side = 16;
inline constexpr int64_t tile_depth = 32;
inline constexpr int64_t tile_numbers = tile_side * tile_depth;
// Rows and columns of the four tiles of sums that two tiles of each operand give.
inline constexpr int64_t block_side = 2 * tile_side;

// Rows of memory that may be read: [begin, end) of them.
struct ReadableRows {
  int64_t begin;
  int64_t end;
};

// 16 rows of memory that lie along the depth, `size` numbers of which are left -> a row of pairs of each.
inline __attribute__((always_inline)) void load_along(Lines<bfloat16> from, ReadableRows rows, int64_t size,
                                                      vuint (&square)[tile_side]) {
  for (int64_t row = 0; row < tile_side; ++row) {
    square[row] = rows.begin <= row && row < rows.end ? load_elements<bfloat16_pair>(from[row], size) : vuint{};
  }
}

// 32 rows of memory, the depth, of `size` columns -> the pairs of two rows each.
inline __attribute__((always_inline)) void load_across(Lines<bfloat16> from, ReadableRows rows, int64_t size,
                                                       vuint (&square)[tile_side]) {
  if (rows.begin <= 0 && rows.end >= tile_depth && size >= tile_side) {
    const auto words = [&](int64_t row) {
      vhalfwords bits;
      __builtin_memcpy(&bits, from[row], sizeof(bits));
      return widen_words(bits);
    };
    for (int64_t pair = 0; pair < tile_side; ++pair) {
      square[pair] = words(2 * pair) | words(2 * pair + 1) << 16;
    }
    return;
  }
  const auto words = [&](int64_t row) {
    vhalfwords bits = {};
    if (rows.begin <= row && row < rows.end) {
      __builtin_memcpy(&bits, from[row], static_cast<size_t>(size < tile_side ? size : tile_side) * sizeof(bfloat16));
    }
    return widen_words(bits);
  };
  for (int64_t pair = 0; pair < tile_side; ++pair) {
    square[pair] = words(2 * pair) | words(2 * pair + 1) << 16;
  }
}

// What is not readable, and what lies behind `size`, becomes zeros.
template <bool as_right>
inline void pack_tile_along(Lines<bfloat16> from, ReadableRows rows, int64_t size, bfloat16* packed) {
  vuint square[tile_side];
  load_along(from, rows, size, square);
  if constexpr (as_right) {
    transpose(square);
  }
  __builtin_memcpy(packed, square, sizeof(square));
}
template <bool as_right>
inline void pack_tile_across(Lines<bfloat16> from, ReadableRows rows, int64_t size, bfloat16* packed) {
  vuint square[tile_side];
  load_across(from, rows, size, square);
  if constexpr (!as_right) {
    transpose(square);
  }
  __builtin_memcpy(packed, square, sizeof(square));
}

// A left operand: rows lie `stride` bytes apart, its tiles so many numbers, down the rows and along the depth.
struct LeftTiles {
  const bfloat16* data;
  int64_t stride;
  int64_t row_step;
  int64_t depth_step;
};
// A right operand, packed.
struct RightTiles {
  const bfloat16* data;
  int64_t column_step;
  int64_t depth_step;
};

// Sums of a block, in tiles 0 to 3: row by row, of rows `stride` floats apart.
inline __attribute__((always_inline)) void zero_block(Tiles& tiles) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
}
inline __attribute__((always_inline)) void load_block(Tiles& tiles, const float* from, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  tiles.load<0>(from, bytes);
  tiles.load<1>(from + tile_side, bytes);
  tiles.load<2>(from + tile_side * stride, bytes);
  tiles.load<3>(from + tile_side * stride + tile_side, bytes);
}
inline __attribute__((always_inline)) void store_block(Tiles& tiles, float* to, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  tiles.store<0>(to, bytes);
  tiles.store<1>(to + tile_side, bytes);
  tiles.store<2>(to + tile_side * stride, bytes);
  tiles.store<3>(to + tile_side * stride + tile_side, bytes);
}

// Adds the products of `depth_tiles` tiles in ascending order: the bits of a sum depend on its row, its column and
// nothing else.
inline __attribute__((always_inline)) void add_to_block(Tiles& tiles, LeftTiles left, RightTiles right,
                                                        int64_t depth_tiles) {
  for (int64_t d = 0; d < depth_tiles; ++d, left.data += left.depth_step, right.data += right.depth_step) {
    tiles.load<4>(left.data, left.stride);
    tiles.load<6>(right.data, 2 * tile_depth);
    tiles.multiply_add<0, 4, 6>();
    tiles.load<7>(right.data + right.column_step, 2 * tile_depth);
    tiles.multiply_add<1, 4, 7>();
    tiles.load<5>(left.data + left.row_step, left.stride);
    tiles.multiply_add<2, 5, 6>();
    tiles.multiply_add<3, 5, 7>();
  }
}

// Rows of the operand that stays packed while blocks of the other one pass by: it fits in the second-level cache.
constexpr int64_t rows_to_keep_packed(int64_t depth_tiles) {
  constexpr int64_t most_numbers = int64_t{1} << 19, fewest = 128, most = 512;
  const int64_t fitting = most_numbers / ((depth_tiles + 1) * tile_depth) / block_side * block_side;
  return fitting < fewest ? fewest : fitting < most ? fitting : most;
}

// `count` rows or columns, the depth along them, padded with zeros into [padded_count / 16][tiles] tiles from `packed`
// on, `row_step` numbers between those of 16 rows.
template <bool as_right>
void pack_count_along(Lines<bfloat16> from, int64_t count, int64_t padded_count, int64_t depth, int64_t row_step,
                      bfloat16* packed) {
  for (int64_t first = 0; first < padded_count; first += tile_side, packed += row_step) {
    for (int64_t d = 0; d < depth; d += tile_depth) {
      pack_tile_along<as_right>(from.from(first, d), {0, count - first}, depth - d,
                                packed + d / tile_depth * tile_numbers);
    }
  }
}

// Blocks of 32 columns times packed rows.
struct PanelProduct {
  int64_t depth_tiles;
  // Whether the rows are the right operand and the columns the left one: then sums are turned.
  bool is_transposed;
  float* sums;    // [32][32]
  float* turned;  // [32][32], where is_transposed

  template <typename Arena>
  PanelProduct(Arena* arena, int64_t tiles, bool transposed)
      : depth_tiles(tiles),
        is_transposed(transposed),
        sums(arena->template take<float>(block_side * block_side)),
        turned(arena->template take<float>(transposed ? block_side * block_side : 0)) {}

  // Numbers between the tiles of 16 packed rows or columns.
  int64_t step() const { return depth_tiles * tile_numbers; }
  LeftTiles packed_left(const bfloat16* data) const { return {data, 2 * tile_depth, step(), tile_numbers}; }
  RightTiles packed_right(const bfloat16* data) const { return {data, step(), tile_numbers}; }

  // finish(row, sums of 32 columns) for each of `num_rows` rows. The columns are left where is_transposed, else right.
  template <typename Finish>
  void run(Tiles& tiles, const bfloat16* rows, int64_t num_rows, LeftTiles left, RightTiles right,
           const Finish& finish) const {
    for (int64_t row = 0; row < num_rows; row += block_side) {
      const bfloat16* const of_rows = rows + row / tile_side * step();
      zero_block(tiles);
      add_to_block(tiles, is_transposed ? left : packed_left(of_rows), is_transposed ? packed_right(of_rows) : right,
                   depth_tiles);
      store_block(tiles, sums, block_side);
      if (is_transposed) {
        turn_sums();
      }
      const float* const of_block = is_transposed ? turned : sums;
      for (int64_t r = 0; r < block_side && row + r < num_rows; ++r) {
        finish(row + r, of_block + r * block_side);
      }
    }
  }

 private:
  void turn_sums() const {
    for (int64_t row = 0; row < block_side; row += tile_side) {
      for (int64_t column = 0; column < block_side; column += tile_side) {
        turn<float>([&](int lane) { return load(sums + (column + lane) * block_side + row); },
                    [&](int lane, vfloat numbers) { store(turned + (row + lane) * block_side + column, numbers); });
      }
    }
  }
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
