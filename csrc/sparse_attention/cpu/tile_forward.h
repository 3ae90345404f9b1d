#pragma once

#include "core/attention/cpu/tile_softmax.h"
#include "sparse_attention/cpu/list_tile.h"

// The forward of lists that several queries share: the keys that one names are gathered once for a tile of them.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename E>
struct TileForwardScratch : TileSoftmax<E> {
  TileLists lists;  // one
  Runs runs;
  E* keys;    // panels [key_block / panel][D][panel]
  E* values;  // [key_block][Dv]

  template <typename T>
  TileForwardScratch(Arena* arena, const Attention<T>& inputs)
      : TileSoftmax<E>(arena, inputs.sizes), lists(arena, inputs.lists, 1), runs(arena, 1) {
    keys = arena->take<E>(key_block<E> * depth_of<E>(inputs.sizes.head_dim));
    values = arena->take<E>(depth_of<E>(key_block<E>) * columns_of<E>(inputs.sizes.value_dim));
  }
};

template <typename E, typename T>
void forward_of_tile(const AttentionForward<T>& args, const TileForwardScratch<E>& scratch, const ListTile& tile,
                     int64_t list) {
  using A = sum_t<E>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const Sequence sequence = inputs.sequence(tile.batch);
  const int64_t kv_head = tile.first_head / sizes.group_size();
  const int64_t padded_rows = round_up(tile.num_rows(), tile_rows), columns = columns_of<E>(sizes.value_dim);
  const List entries = scratch.lists[0];
  pack_left(ListTile::Rows<T>{tile, inputs.query, tile.first_seeing(inputs.rule, sequence, entries.first_key)},
            sizes.head_dim, padded_rows, scratch.queries);
  scratch.clear(padded_rows, columns);
  scratch.runs.start(0, entries, end_of_keys(inputs.rule, sequence, tile.last_query()));
  const auto next = [&] { return scratch.runs.next(0, sizes.num_keys, key_block<E>, inputs.rule.block_size == 1); };
  for (Run run = next(); run.count > 0; run = next()) {
    const int64_t num_keys = round_up(run.count, panel_columns<A>);
    pack_transposed(ListedRows<T>(inputs.key, tile.batch, kv_head, run), sizes.head_dim, num_keys, scratch.keys);
    pack_right(ListedRows<T>(inputs.value, tile.batch, kv_head, run), sizes.value_dim, num_keys, scratch.values);
    const bool biased = load_biases(inputs, tile.batch, tile.first_head, list, run, num_keys, scratch.bias);
    scratch.compute_scores(sizes.head_dim, scratch.keys, tile.num_rows(), num_keys, inputs.scale, biased,
                           tile.ranges_of(inputs.rule, sequence, run), 0);
    scratch.compute_weights(padded_rows, num_keys);
    scratch.add_values(padded_rows, columns, 0, depth_of<E>(run.count), scratch.values, columns);
  }
  for (int64_t row = 0; row < tile.num_rows(); ++row) {
    finish_row(args, tile.batch, tile.head_of(row), tile.query_of(row), scratch.largest[row],
               sum_lanes<A>(scratch.sum[row]), scratch.output + row * columns);
  }
}

template <typename T>
void forward_by_tile(const AttentionForward<T>& args, void* scratch, int64_t begin, int64_t end) {
  const Attention<T>& inputs = args.inputs;
  Arena arena(scratch);
  const TileForwardScratch<multiplicand_t<T>> buffers(&arena, inputs);
  const int64_t lists = inputs.lists.num_lists, groups = inputs.sizes.num_heads / inputs.heads_of_list();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / lists / groups, head = unit / lists % groups * inputs.heads_of_list();
    const int64_t list = balanced_tile(unit % lists, lists);
    fill_list(buffers.lists, 0, inputs, batch, head, list, Range{0, inputs.sizes.num_keys});
    for_tiles(inputs, batch, head, list, [&](const ListTile& tile) { forward_of_tile(args, buffers, tile, list); });
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
