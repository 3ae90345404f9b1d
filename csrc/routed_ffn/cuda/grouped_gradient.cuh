#pragma once

#include "routed_ffn/cuda/grouped_product.cuh"

namespace torchops::kernels::routed_ffn {

// A block for each group and tile of its matrix, grid [count * tiles of rows * tiles of columns]. It adds up the
// group's rows in ascending order.
template <typename Tile, typename T>
__global__ void __launch_bounds__(Tile::threads) grouped_gradient(GroupedGradient<T> args, WideOperands wide) {
  const auto row_tiles = static_cast<unsigned>((args.num_rows + Tile::rows - 1) / Tile::rows);
  const auto column_tiles = static_cast<unsigned>((args.num_columns + Tile::columns - 1) / Tile::columns);
  const int64_t first_column = int64_t{blockIdx.x % column_tiles} * Tile::columns;
  const int64_t first_row = int64_t{blockIdx.x / column_tiles % row_tiles} * Tile::rows;
  const auto group = static_cast<int>(blockIdx.x / column_tiles / row_tiles);
  const RowRange rows = rows_of_group(args.groups, group);

  device::SharedMemory memory;
  GatheredTile<Tile::depth, Tile::threads> left_lines, right_lines;
  const auto find = [&](int64_t first) {
    left_lines.find(args.left, first, rows.end);
    right_lines.find(args.right, first, rows.end);
  };
  find(rows.first);
  auto copy = [&, first = rows.first](T* left_tile, T* right_tile) mutable {
    if (first >= rows.end) {
      return;
    }
    left_lines.template copy_async<Tile::rows>(left_tile, args.left, first_row, args.num_rows, wide.left);
    right_lines.template copy_async<Tile::columns>(right_tile, args.right, first_column, args.num_columns, wide.right);
    first += Tile::depth;
    find(first);  // while the block multiplies
  };
  TileStream<Tile, T, decltype(copy)> tiles(memory, copy);

  Tile products;
  for (int64_t first = rows.first; first < rows.end; first += Tile::depth) {
    tiles.next();
    products.multiply(tiles.left(), tiles.right());
  }
  T* const output = args.output + group * args.output_group_stride + first_row * args.output_row_stride + first_column;
  products.for_sums([&](int row, int column, accumulate_t<T> sum) {
    if (row < args.num_rows - first_row && column < args.num_columns - first_column) {
      output[row * args.output_row_stride + column] = device::narrow<T>(sum);
    }
  });
}

}  // namespace torchops::kernels::routed_ffn
