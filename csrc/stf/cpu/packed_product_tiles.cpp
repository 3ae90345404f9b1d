#include "core/cpu/arena.h"
#include "core/cpu/dense_product_output.h"
#include "core/cpu/tile_operands.h"
#include "stf/cpu/packed_groups.h"
#include "stf/cpu/packed_tiles.h"

// Two columns of a group of 16 rows are 32 neighbouring bits and the values that follow each other: one instruction
// spreads them. Interleaved, they are 16 pairs of a right operand; one behind the other, halves of two rows of a
// left one.

namespace torchops::kernels::stf::TORCHOPS_LEVEL {
namespace {

using core::DenseProduct;
using core::TORCHOPS_LEVEL::finish_on_tiles;
using core::TORCHOPS_LEVEL::Pieces;

using Halfwords = vec<uint16_t>;

// The values of the next two columns, or of one, 16 rows each.
inline __attribute__((always_inline)) Halfwords spread_columns(const bfloat16*& values, const uint16_t* mask,
                                                               int64_t columns) {
  uint32_t bits = mask[0];
  bits |= columns > 1 ? static_cast<uint32_t>(mask[1]) << 16 : 0;
  const auto rows = bit_cast<Halfwords>(_mm512_maskz_expandloadu_epi16(bits, values));
  values += __builtin_popcount(bits);
  return rows;
}

// What both directions share: blocks of 32 columns of the output, each a panel that is spread once for all tokens of
// a tile of them.
struct Product {
  const PackedTileProduct& args;
  DenseProduct<bfloat16> output;
  int64_t tiles_of_block;  // along the depth
  int64_t depth_tiles;
  Pieces token_tiles;
  int64_t num_panels;
  PanelProduct panel;
  bfloat16* tokens;         // [tokens / 16][depth_tiles] tiles
  bfloat16* columns;        // [2][depth_tiles] tiles
  const bfloat16** values;  // [groups], rows to atoms: of the next column of each

  Product(const PackedTileProduct& product, Arena* arena)
      : args(product),
        output{},
        tiles_of_block(divide_up(product.to_atoms ? product.factor.num_rows : product.factor.basis_size, tile_depth)),
        depth_tiles(product.to_atoms ? tiles_of_block : product.factor.num_blocks * tiles_of_block),
        token_tiles(product.num_tokens, rows_to_keep_packed(depth_tiles), block_side),
        num_panels(divide_up(num_columns(), block_side)),
        panel(arena, depth_tiles, product.to_atoms) {
    tokens = arena->take<bfloat16>(token_tiles.size * depth_tiles * tile_depth);
    columns = arena->take<bfloat16>(block_side * depth_tiles * tile_depth);
    values = arena->take<const bfloat16*>(product.to_atoms ? product.factor.num_groups() : 0);
    output.bias = product.bias;
    output.output = product.output;
    output.output_batch_stride = product.num_tokens * num_columns();
    output.output_row_stride = num_columns();
  }

  int64_t num_columns() const { return args.to_atoms ? args.factor.basis_size : args.factor.num_rows; }
  int64_t num_units() const { return (args.to_atoms ? args.factor.num_blocks : 1) * token_tiles.count * num_panels; }

  bool run(int64_t begin, int64_t end) {
    const int64_t groups = args.factor.num_groups();
    if (args.to_atoms && !masks_are_right(0, groups)) {
      return false;
    }
    Tiles tiles;
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / num_panels / token_tiles.count;
      const int64_t first = unit / num_panels % token_tiles.count * token_tiles.size;
      const int64_t count = smaller(token_tiles.size, args.num_tokens - first);
      const int64_t column = unit % num_panels * block_side;
      const int64_t group = column / rows_per_group;
      if (!args.to_atoms && !masks_are_right(group, smaller(group + block_side / rows_per_group, groups))) {
        return false;
      }
      if (unit / num_panels != packed) {
        pack_tokens(first, count);
        packed = unit / num_panels;
        if (args.to_atoms) {
          find_values(block, column);
        }
      }
      args.to_atoms ? spread_to_left(block, column) : spread_to_right(column);
      panel.run(tiles, tokens, count, panel.packed_left(columns), panel.packed_right(columns),
                [&](int64_t token, const float* sums) {
                  finish_on_tiles(output, block, first + token, column, sums,
                                  smaller(block_side, num_columns() - column));
                });
    }
    return true;
  }

 private:
  // Whether the masks of groups have as many bits as there are values.
  bool masks_are_right(int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) {
      if (!counts_are_right(args.factor, group)) {
        return false;
      }
    }
    return true;
  }

  void pack_tokens(int64_t first, int64_t count) {
    const int64_t padded = round_up(count, block_side), step = panel.step();
    const bfloat16* const from = args.tokens + first * args.token_stride;
    if (args.to_atoms) {
      pack_count_along<true>({from, args.token_stride}, count, padded, args.factor.num_rows, step, tokens);
      return;
    }
    for (int64_t block = 0; block < args.factor.num_blocks; ++block) {
      pack_count_along<false>({from + block * args.block_stride, args.token_stride}, count, padded,
                              args.factor.basis_size, step, tokens + block * tiles_of_block * tile_numbers);
    }
  }

  // 32 rows of the factor, its columns the depth.
  void spread_to_right(int64_t first_row) {
    const PackedFactor<bfloat16>& factor = args.factor;
    Halfwords by_turns;
    for (int lane = 0; lane < tile_depth; ++lane) {
      by_turns[lane] = static_cast<uint16_t>(lane / 2 + lane % 2 * tile_side);
    }
    for (int64_t tile = 0; tile < block_side / rows_per_group; ++tile) {
      const int64_t group = first_row / rows_per_group + tile;
      bfloat16* to = columns + tile * panel.step();
      if (group >= factor.num_groups()) {
        __builtin_memset(to, 0, static_cast<size_t>(panel.step()) * sizeof(bfloat16));
        continue;
      }
      const bfloat16* from = factor.values + group * factor.row_size() * rows_per_group;
      const uint16_t* mask = factor.mask + group * factor.num_blocks * factor.basis_size;
      for (int64_t block = 0; block < factor.num_blocks; ++block, mask += factor.basis_size) {
        for (int64_t column = 0; column < tiles_of_block * tile_depth; column += 2, to += tile_depth) {
          Halfwords pairs = {};
          if (column < factor.basis_size) {
            pairs = __builtin_shuffle(spread_columns(from, mask + column, factor.basis_size - column), by_turns);
          }
          __builtin_memcpy(to, &pairs, sizeof(pairs));
        }
      }
    }
  }

  // Where each group's values of a column of a block begin.
  void find_values(int64_t block, int64_t column) {
    const PackedFactor<bfloat16>& factor = args.factor;
    for (int64_t group = 0; group < factor.num_groups(); ++group) {
      const int64_t index = group * factor.num_blocks + block;
      const uint16_t* const mask = factor.mask + index * factor.basis_size;
      int64_t before = 0;
      for (int64_t c = 0; c < column; ++c) {
        before += __builtin_popcount(mask[c]);
      }
      values[group] = factor.values + index * factor.nnz * rows_per_group + before;
    }
  }

  // 32 columns of a block of the factor, its rows the depth.
  void spread_to_left(int64_t block, int64_t first_column) {
    const PackedFactor<bfloat16>& factor = args.factor;
    const int64_t count = smaller(block_side, factor.basis_size - first_column);
    __builtin_memset(columns, 0, static_cast<size_t>(2 * panel.step()) * sizeof(bfloat16));
    for (int64_t group = 0; group < factor.num_groups(); ++group) {
      const uint16_t* const mask = factor.mask + (group * factor.num_blocks + block) * factor.basis_size + first_column;
      bfloat16* const of_group =
          columns + group * rows_per_group / tile_depth * tile_numbers + group * rows_per_group % tile_depth;
      for (int64_t column = 0; column < count; column += 2) {
        const Halfwords both = spread_columns(values[group], mask + column, count - column);
        bfloat16* const to = of_group + column / tile_side * panel.step() + column % tile_side * tile_depth;
        // The second of one column is zeros: it has no bits.
        __builtin_memcpy(to, &both, sizeof(both) / 2);
        __builtin_memcpy(to + tile_depth, reinterpret_cast<const char*>(&both) + sizeof(both) / 2, sizeof(both) / 2);
      }
    }
  }
};

}  // namespace

int64_t packed_tile_units(const PackedTileProduct& args) {
  Arena arena(nullptr);
  return Product(args, &arena).num_units();
}

int64_t packed_tile_scratch_bytes(const PackedTileProduct& args) {
  Arena arena(nullptr);
  Product(args, &arena);
  return arena.bytes();
}

bool packed_tile_product(const PackedTileProduct& args, void* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  return Product(args, &arena).run(begin, end);
}

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
