#pragma once

#include "routed_ffn/cuda/gathered_tile.cuh"
#include "routed_ffn/cuda/tile_products.cuh"
#include "routed_ffn/cuda/tile_stream.cuh"

namespace torchops::kernels::routed_ffn {

// Which operands can be copied 16 bytes at a time.
struct WideOperands {
  bool left, right;
};

// Zeros in a tile's columns of rows that no group has.
template <typename T>
__device__ void clear_rows(const GroupedProduct<T>& args, const RowRange& rows, int64_t first_column, int columns) {
  for (int64_t row = rows.first + device::warp_index(); row < rows.end; row += blockDim.x / device::warp_size) {
    for (int i = device::lane_index(); i < columns && first_column + i < args.num_columns; i += device::warp_size) {
      const int64_t at = row * args.output_stride + first_column + i;
      if (args.output != nullptr) {
        args.output[at] = T{};
      } else {
        args.wide_output[at] = 0;
      }
    }
  }
}

// A block for each tile of rows and columns, grid [num_slots(Tile::rows) * tiles of columns].
template <typename Tile, bool along_depth, typename T>
__global__ void __launch_bounds__(Tile::threads) grouped_product(GroupedProduct<T> args, WideOperands wide) {
  using A = accumulate_t<T>;
  const auto column_tiles = static_cast<unsigned>((args.num_columns + Tile::columns - 1) / Tile::columns);
  const int64_t first_column = int64_t{blockIdx.x % column_tiles} * Tile::columns;
  const TileOfGroup tile = tile_of_slot(args.groups, blockIdx.x / column_tiles, Tile::rows);
  const int64_t group = tile.group;
  const RowRange rows{tile.rows.first, device::min(tile.rows.end, tile.rows.first + Tile::rows)};
  if (group == args.groups.count && !args.adds) {
    clear_rows(args, rows, first_column, Tile::columns);
  }
  if (rows.first >= rows.end || group == args.groups.count) {
    return;
  }

  device::SharedMemory memory;
  GatheredTile<Tile::rows, Tile::threads> lines;
  lines.find(args.left, rows.first, rows.end);
  const T* const right = args.right + group * args.right_group_stride;
  auto copy = [&, first = int64_t{0}](T* left_tile, T* right_tile) mutable {
    if (first >= args.depth) {
      return;
    }
    lines.template copy_async<Tile::depth>(left_tile, args.left, first, args.depth, wide.left);
    if constexpr (along_depth) {
      const device::MatrixRows<const T> from{right + first_column * args.column_stride + first, args.column_stride,
                                             static_cast<int>(args.depth - first)};
      device::copy_tile_async<Tile::columns, Tile::depth, Tile::threads>(
          right_tile, from, 0, static_cast<int>(args.num_columns - first_column), wide.right);
    } else {
      const device::MatrixRows<const T> from{right + first * args.depth_stride + first_column, args.depth_stride,
                                             static_cast<int>(args.num_columns - first_column)};
      device::copy_tile_async<Tile::depth, Tile::columns, Tile::threads>(
          right_tile, from, 0, static_cast<int>(args.depth - first), wide.right);
    }
    first += Tile::depth;
  };
  TileStream<Tile, T, decltype(copy)> tiles(memory, copy);

  Tile products;
  for (int64_t first = 0; first < args.depth; first += Tile::depth) {
    tiles.next();
    products.multiply(tiles.left(), tiles.right());
  }
  const T* const bias = args.bias == nullptr ? nullptr : args.bias + group * args.bias_stride + first_column;
  const int64_t corner = rows.first * args.output_stride + first_column;
  products.for_sums([&](int row, int column, A sum) {
    if (row >= rows.end - rows.first || column >= args.num_columns - first_column) {
      return;
    }
    if (bias != nullptr) {
      sum += device::widen(device::ldg(bias + column));
    }
    const int64_t at = corner + row * args.output_stride + column;
    if (args.output != nullptr) {
      args.output[at] = device::narrow<T>(args.adds ? device::widen(args.output[at]) + sum : sum);
    } else {
      args.wide_output[at] = args.adds ? args.wide_output[at] + sum : sum;
    }
  });
}

}  // namespace torchops::kernels::routed_ffn
