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
  // Packed rows, of which a block of columns reads all, stay in the second-level cache.
  static constexpr int64_t most_numbers = int64_t{1} << 19;
  static constexpr int64_t fewest_rows = 128;
  static constexpr int64_t most_rows = 512;
  // Columns that are read no more than twice are not packed.
  static constexpr int64_t rows_to_read_in_place = 2 * block_side;

  const DenseProduct<bfloat16>& args;
  int64_t depth_tiles;
  Pieces row_tiles;
  int64_t num_panels;
  bool is_transposed;
  bfloat16* left;   // [rows / 16][depth_tiles] tiles
  bfloat16* right;  // [2][depth_tiles] tiles
  float* sums;      // [32][32]
  float* turned;    // [32][32], where is_transposed

  TileProduct(const DenseProduct<bfloat16>& product, Arena* arena)
      : args(product),
        depth_tiles(divide_up(product.depth, tile_depth)),
        row_tiles(product.num_rows, rows_of_tile(depth_tiles), block_side),
        num_panels(divide_up(product.num_columns, block_side)),
        is_transposed(product.right.column_stride != 1) {
    left = arena->take<bfloat16>(row_tiles.size * depth_tiles * tile_depth);
    right = arena->take<bfloat16>(block_side * depth_tiles * tile_depth);
    sums = arena->take<float>(block_side * block_side);
    turned = arena->take<float>(block_side * block_side);
  }

  static int64_t rows_of_tile(int64_t depth_tiles) {
    const int64_t fitting = most_numbers / (depth_tiles * tile_depth) / block_side * block_side;
    return fitting < fewest_rows ? fewest_rows : smaller(fitting, most_rows);
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
      multiply(tiles, batch, first_row, rows, unit % num_panels * block_side);
    }
  }

 private:
  void multiply(Tiles& tiles, int64_t batch, int64_t first_row, int64_t rows, int64_t column) {
    const int64_t columns = smaller(block_side, args.num_columns - column);
    const LeftTiles turned_right = is_transposed ? pack_turned_right(batch, column, columns) : LeftTiles{};
    if (!is_transposed) {
      pack_right(batch, column, columns);
    }
    const int64_t step = depth_tiles * tile_numbers;
    for (int64_t row = 0; row < rows; row += block_side) {
      const bfloat16* const of_rows = left + row / tile_side * step;
      zero_block(tiles);
      if (is_transposed) {
        add_to_block(tiles, turned_right, RightTiles{of_rows, step, tile_numbers}, depth_tiles);
      } else {
        add_to_block(tiles, LeftTiles{of_rows, 2 * tile_depth, step, tile_numbers},
                     RightTiles{right, step, tile_numbers}, depth_tiles);
      }
      store_block(tiles, sums, block_side);
      if (is_transposed) {
        turn_sums();
      }
      const float* const of_block = is_transposed ? turned : sums;
      for (int64_t r = 0; r < block_side && row + r < rows; ++r) {
        finish(args, batch, first_row + row + r, column, of_block + r * block_side, columns);
      }
    }
  }

  void turn_sums() {
    for (int64_t row = 0; row < block_side; row += tile_side) {
      for (int64_t column = 0; column < block_side; column += tile_side) {
        turn<float>([&](int lane) { return load(sums + (column + lane) * block_side + row); },
                    [&](int lane, vfloat numbers) { store(turned + (row + lane) * block_side + column, numbers); });
      }
    }
  }

  void pack_left(int64_t batch, int64_t first_row, int64_t rows) {
    const Matrices<bfloat16>& matrix = args.left;
    const bfloat16* const from = matrix.data + batch * matrix.batch_stride + first_row * matrix.row_stride;
    const int64_t padded_rows = round_up(rows, block_side);
    if (matrix.column_stride == 1) {
      is_transposed ? pack_along<true>(from, matrix.row_stride, rows, padded_rows, left)
                    : pack_along<false>(from, matrix.row_stride, rows, padded_rows, left);
    } else {
      is_transposed ? pack_across<true>(from, matrix.column_stride, rows, padded_rows, left)
                    : pack_across<false>(from, matrix.column_stride, rows, padded_rows, left);
    }
  }

  void pack_right(int64_t batch, int64_t column, int64_t columns) {
    pack_across<true>(args.right.data + batch * args.right.batch_stride + column, args.right.row_stride, columns,
                      block_side, right);
  }

  LeftTiles pack_turned_right(int64_t batch, int64_t column, int64_t columns) {
    const int64_t stride = args.right.column_stride;
    const bfloat16* const from = args.right.data + batch * args.right.batch_stride + column * stride;
    if (args.num_rows <= rows_to_read_in_place && columns == block_side && args.depth % tile_depth == 0) {
      return {from, 2 * stride, tile_side * stride, tile_depth};
    }
    pack_along<false>(from, stride, columns, block_side, right);
    return {right, 2 * tile_depth, depth_tiles * tile_numbers, tile_numbers};
  }

  // `count` rows or columns, padded with zeros, into [padded_count / 16][depth_tiles] tiles.
  template <bool as_right>
  void pack_along(const bfloat16* from, int64_t stride, int64_t count, int64_t padded_count, bfloat16* packed) const {
    for (int64_t first = 0; first < padded_count; first += tile_side) {
      for (int64_t d = 0; d < depth_tiles; ++d, packed += tile_numbers) {
        pack_tile_along<as_right>(from + first * stride + d * tile_depth, stride, {0, count - first},
                                  args.depth - d * tile_depth, packed);
      }
    }
  }
  template <bool as_right>
  void pack_across(const bfloat16* from, int64_t stride, int64_t count, int64_t padded_count, bfloat16* packed) const {
    for (int64_t first = 0; first < padded_count; first += tile_side) {
      for (int64_t d = 0; d < depth_tiles; ++d, packed += tile_numbers) {
        const int64_t depth = first < count ? args.depth - d * tile_depth : 0;
        pack_tile_across<as_right>(from + d * tile_depth * stride + first, stride, {0, depth}, count - first, packed);
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
