#pragma once

#include "core/attention/cpu/uses_tiles.h"
#include "core/cpu/short_exponential.h"
#include "core/cpu/tile_operands.h"
#include "span_attention/cpu/tiles.h"

// Rows of queries, keys and values as operands of products of tiles, and what becomes of the products.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

// Tiles that a row has along the depth.
constexpr int64_t depth_tiles(int64_t size) {
  return divide_up(size, tile_depth);
}
// Columns in whole blocks of sums.
constexpr int64_t block_columns(int64_t size) {
  return round_up(size, block_side);
}

inline ReadableRows readable(Range rows) {
  return {rows.begin, rows.end};
}
inline ReadableRows from_row(ReadableRows rows, int64_t first) {
  return {rows.begin - first, rows.end - first};
}

// `count` rows, the depth along them, as rows of a left or columns of a right operand: [count / 16][depth_tiles(size)].
// Rows that are not readable are zeros.
template <bool as_right>
void pack_rows_along(const bfloat16* rows, int64_t row_stride, ReadableRows used, int64_t size, int64_t count,
                     bfloat16* packed) {
  for (int64_t row = 0; row < count; row += tile_side) {
    for (int64_t d = 0; d < size; d += tile_depth, packed += tile_numbers) {
      pack_tile_along<as_right>({rows + row * row_stride + d, row_stride}, from_row(used, row), size - d, packed);
    }
  }
}

// `count` rows, which are the depth, as a right operand, or turned as a left one: [count / 32][block_columns(size) /
// 16].
template <bool as_right>
void pack_rows_across(const bfloat16* rows, int64_t row_stride, ReadableRows used, int64_t size, int64_t count,
                      bfloat16* packed) {
  for (int64_t row = 0; row < count; row += tile_depth) {
    for (int64_t d = 0; d < block_columns(size); d += tile_side, packed += tile_numbers) {
      const ReadableRows none{0, 0};
      pack_tile_across<as_right>({rows + row * row_stride + d, row_stride}, d < size ? from_row(used, row) : none,
                                 size - d, packed);
    }
  }
}

// Softmax takes the distances of scores from the largest one. Where nothing but a positive scale lies between products
// and scores, it takes those of the products, which then need not become scores, and the largest that is saved for the
// backward is a product.
struct Distances {
  bool of_products;
  float scale;  // a score's distance / a distance

  explicit Distances(const Attention<bfloat16>& args)
      : of_products(args.key_bias == nullptr && args.sink == nullptr && args.scale > 0),
        scale(of_products ? args.scale : 1) {}

  // exp of a score's distance, of one that is at most 0.
  vfloat weight(vfloat distance) const {
    constexpr float log2_e = 0x1.715476p+0f;
    return exp2_of_negative(distance * (scale * log2_e));
  }
};

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
