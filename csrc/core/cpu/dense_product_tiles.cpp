#include "core/cpu/arena.h"
#include "core/cpu/dense_product_kernel.h"
#include "core/cpu/dense_product_output.h"
#include "core/cpu/tile_operands.h"

// The dense product of bfloat16 on tiles; what tiles do not serve goes to the level below.

namespace torchops::kernels::core::TORCHOPS_LEVEL {
namespace {

// Blocks of rows and columns whose whole depth is added up in tiles. A unit is a tile of rows for 32 columns. The
// operand whose memory lies along the depth is the left one of the instruction, for it needs no transposition: where
// that is `right`, the blocks of the output are transposed instead, and the bits are the same.
struct TileProduct {
  // Columns that are read no more than twice are not packed.
  static constexpr int64_t rows_to_read_in_place = 2 * block_side;

  const DenseProduct<bfloat16>& args;
  int64_t depth_tiles;
  Pieces row_tiles;
  int64_t num_panels;
  PanelProduct panel;
  bfloat16* left;   // [rows / 16][depth_tiles] tiles
  bfloat16* right;  // [2][depth_tiles] tiles

  TileProduct(const DenseProduct<bfloat16>& product, Arena* arena)
      : args(product),
        depth_tiles(divide_up(product.depth, tile_depth)),
        row_tiles(product.num_rows, rows_to_keep_packed(depth_tiles), block_side),
        num_panels(divide_up(product.num_columns, block_side)),
        panel(arena, depth_tiles, !lines_are_rows(product.right)) {
    left = arena->take<bfloat16>(row_tiles.size * depth_tiles * tile_depth);
    right = arena->take<bfloat16>(block_side * depth_tiles * tile_depth);
  }

  int64_t num_units() const { return row_tiles.count * num_panels * args.num_batches; }

  void run(int64_t begin, int64_t end) {
    Tiles tiles;
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / num_panels / row_tiles.count;
      const int64_t first_row = unit / num_panels % row_tiles.count * row_tiles.size;
      const int64_t rows = smaller(row_tiles.size, args.num_rows - first_row);
      if (unit / num_panels != packed) {
        pack_left(batch, first_row, rows);
        packed = unit / num_panels;
      }
      const int64_t column = unit % num_panels * block_side;
      const int64_t columns = smaller(block_side, args.num_columns - column);
      panel.run(tiles, left, rows, columns_as_left(batch, column, columns), columns_as_right(batch, column, columns),
                [&](int64_t row, const float* sums) {
                  finish_on_tiles(args, batch, first_row + row, column, sums, columns);
                });
    }
  }

 private:
  void pack_left(int64_t batch, int64_t first_row, int64_t rows) {
    const auto from = lines_of(args.left, batch, first_row, 0);
    const int64_t padded_rows = round_up(rows, block_side);
    if (lines_are_rows(args.left)) {
      panel.is_transposed ? pack_count_along<true>(from, rows, padded_rows, args.depth, panel.step(), left)
                          : pack_count_along<false>(from, rows, padded_rows, args.depth, panel.step(), left);
    } else {
      panel.is_transposed ? pack_across<true>(from, rows, padded_rows, left)
                          : pack_across<false>(from, rows, padded_rows, left);
    }
  }

  RightTiles columns_as_right(int64_t batch, int64_t column, int64_t columns) {
    if (!panel.is_transposed) {
      pack_across<true>(lines_of(args.right, batch, 0, column), columns, block_side, right);
    }
    return panel.packed_right(right);
  }

  LeftTiles columns_as_left(int64_t batch, int64_t column, int64_t columns) {
    if (panel.is_transposed) {
      const auto from = lines_of(args.right, batch, 0, column);
      if (from.index == nullptr && args.num_rows <= rows_to_read_in_place && columns == block_side &&
          args.depth % tile_depth == 0) {
        return {from.data, 2 * from.stride, tile_side * from.stride, tile_depth};
      }
      pack_count_along<false>(from, columns, block_side, args.depth, panel.step(), right);
    }
    return panel.packed_left(right);
  }

  // `count` rows or columns, the depth across them, padded with zeros into [padded_count / 16][depth_tiles] tiles.
  template <bool as_right>
  void pack_across(Lines<bfloat16> from, int64_t count, int64_t padded_count, bfloat16* packed) const {
    for (int64_t first = 0; first < padded_count; first += tile_side) {
      for (int64_t d = 0; d < depth_tiles; ++d, packed += tile_numbers) {
        const int64_t depth = first < count ? args.depth - d * tile_depth : 0;
        pack_tile_across<as_right>(from.from(d * tile_depth, first), {0, depth}, count - first, packed);
      }
    }
  }
};

// Fewer rows do not fill a tile, and take as long as it takes to read the other operand.
constexpr int64_t fewest_rows_for_tiles = tile_side;

// Does body(product, arena) on tiles, or `otherwise`, which asks the level below.
template <typename T, typename Body, typename Otherwise>
auto with_product(const DenseProduct<T>& args, void* scratch, const Body& body, const Otherwise& otherwise) {
  if constexpr (is_pair<multiplicand_t<T>>) {
    if (args.num_rows >= fewest_rows_for_tiles) {
      Arena arena(scratch);
      TileProduct product(args, &arena);
      return body(product, arena);
    }
  }
  return otherwise();
}

}  // namespace

template <typename T>
int64_t dense_product_units(const DenseProduct<T>& args) {
  return with_product(
      args, nullptr, [](const auto& product, const Arena&) { return product.num_units(); },
      [&] { return avx512_bf16::dense_product_units(args); });
}

template <typename T>
int64_t dense_product_scratch_bytes(const DenseProduct<T>& args) {
  return with_product(
      args, nullptr, [](const auto&, const Arena& arena) { return arena.bytes(); },
      [&] { return avx512_bf16::dense_product_scratch_bytes(args); });
}

template <typename T>
void dense_product(const DenseProduct<T>& args, void* scratch, int64_t begin, int64_t end) {
  with_product(
      args, scratch, [&](auto& product, const Arena&) { product.run(begin, end); },
      [&] { avx512_bf16::dense_product(args, scratch, begin, end); });
}

#define TORCHOPS_INSTANTIATE(T)                                         \
  template int64_t dense_product_units(const DenseProduct<T>&);         \
  template int64_t dense_product_scratch_bytes(const DenseProduct<T>&); \
  template void dense_product(const DenseProduct<T>&, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::core::TORCHOPS_LEVEL
