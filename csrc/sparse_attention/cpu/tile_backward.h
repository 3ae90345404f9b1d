#pragma once

#include "sparse_attention/cpu/key_sums.h"
#include "sparse_attention/cpu/list_tile.h"

// The backward of lists that several queries share: the keys that one names are gathered once for a tile of them.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename E>
struct TileBackwardScratch {
  using A = sum_t<E>;

  TileLists lists;  // one
  Runs runs;
  Meeting<E> meeting;
  E* keys_transposed;    // panels [key_tile / panel][D][panel]
  E* values_transposed;  // panels [key_tile / panel][Dv][panel]
  E* keys;               // right operand [key_tile][D]
  E* queries_left;       // left operand [query_tile][D]
  E* queries;            // right operand [query_tile][D], the same where E is no pair
  E* grads_left;         // left operand [query_tile][Dv]: grad_output
  E* grads;              // right operand [query_tile][Dv]
  A* query_sums;         // [query_tile][D], without the scale
  A* bias_sums;          // [key_tile]
  KeySums<E> sums;

  template <typename T>
  TileBackwardScratch(Arena* arena, const AttentionBackward<T>& args, int64_t num_keys)
      : lists(arena, args.inputs.lists, 1), runs(arena, 1), meeting(arena), sums(arena, args, num_keys) {
    const Sizes& sizes = args.inputs.sizes;
    keys_transposed = arena->take<E>(key_tile<E> * depth_of<E>(sizes.head_dim));
    values_transposed = arena->take<E>(key_tile<E> * depth_of<E>(sizes.value_dim));
    keys = arena->take<E>(depth_of<E>(key_tile<E>) * columns_of<E>(sizes.head_dim));
    queries = arena->take<E>(depth_of<E>(query_tile) * columns_of<E>(sizes.head_dim));
    grads = arena->take<E>(depth_of<E>(query_tile) * columns_of<E>(sizes.value_dim));
    queries_left = is_pair<E> ? arena->take<E>(query_tile * left_stride<E>(sizes.head_dim)) : queries;
    grads_left = is_pair<E> ? arena->take<E>(query_tile * left_stride<E>(sizes.value_dim)) : grads;
    query_sums = arena->take<A>(query_tile * columns_of<E>(sizes.head_dim));
    bias_sums = arena->take<A>(key_tile<E>);
  }
};

// The lists of heads [head, head + heads_of_list()).
template <typename T>
struct TileBackward {
  using E = multiplicand_t<T>;
  using A = sum_t<E>;

  const AttentionBackward<T>& args;
  const TileBackwardScratch<E>& scratch;
  int64_t batch;
  int64_t head;
  bool for_queries;
  const KeySums<E>* for_keys;

  static int64_t units(const Attention<T>& inputs) { return inputs.lists.num_lists; }

  void compute(int64_t list) const {
    fill_list(scratch.lists, 0, inputs(), batch, head, list,
              for_keys == nullptr ? Range{0, sizes().num_keys} : for_keys->range);
    for_tiles(inputs(), batch, head, list, [&](const ListTile& tile) { compute_tile(tile, list); });
  }

 private:
  const Attention<T>& inputs() const { return args.inputs; }
  const Sizes& sizes() const { return inputs().sizes; }
  int64_t columns() const { return columns_of<E>(sizes().head_dim); }
  int64_t value_columns() const { return columns_of<E>(sizes().value_dim); }

  void compute_tile(const ListTile& tile, int64_t list) const {
    const Sequence sequence = inputs().sequence(batch);
    const int64_t rows = round_up(tile.num_rows(), tile_rows);
    const List entries = scratch.lists[0];
    load_queries(tile, tile.first_seeing(inputs().rule, sequence, entries.first_key), rows);
    clear(scratch.query_sums, rows * columns());
    scratch.runs.start(0, entries, end_of_keys(inputs().rule, sequence, tile.last_query()));
    const auto next = [&] {
      return scratch.runs.next(0, sizes().num_keys, key_tile<E>, inputs().rule.block_size == 1);
    };
    for (Run run = next(); run.count > 0; run = next()) {
      meet(tile, list, run, tile.ranges_of(inputs().rule, sequence, run), rows);
    }
    if (for_queries && args.grad_query.data != nullptr) {
      for (int64_t row = 0; row < tile.num_rows(); ++row) {
        store_gradient(args.grad_query.row(batch, tile.head_of(row), tile.query_of(row)),
                       scratch.query_sums + row * columns(), sizes().head_dim, inputs().scale);
      }
    }
  }

  void load_queries(const ListTile& tile, int64_t first_seeing, int64_t rows) const {
    const Meeting<E>& meeting = scratch.meeting;
    for (int64_t in_tile = 0; in_tile < tile.num_heads; ++in_tile) {
      const int64_t first = in_tile * tile.num_queries;
      load_normalizers(args, batch, tile.first_head + in_tile,
                       Range{tile.first_query, tile.first_query + tile.num_queries},
                       in_tile == tile.num_heads - 1 ? rows - first : tile.num_queries, meeting.largest + first,
                       meeting.inverse_sum + first, meeting.delta + first);
    }
    const auto pack = [&](const Heads<const T>& tensor, int64_t size, E* left, E* right) {
      const ListTile::Rows<T> of_queries{tile, tensor, first_seeing};
      pack_right(of_queries, size, rows, right);
      if constexpr (is_pair<E>) {
        pack_left(of_queries, size, rows, left);
      }
    };
    pack(inputs().query, sizes().head_dim, scratch.queries_left, scratch.queries);
    if (sizes().value_dim > 0) {
      pack(args.grad_output, sizes().value_dim, scratch.grads_left, scratch.grads);
    }
  }

  void meet(const ListTile& tile, int64_t list, const Run& run, const TileRanges& seen, int64_t rows) const {
    const Meeting<E>& meeting = scratch.meeting;
    const int64_t kv_head = tile.first_head / sizes().group_size();
    const ListedRows<T> keys(inputs().key, batch, kv_head, run);
    pack_transposed(keys, sizes().head_dim, key_tile<E>, scratch.keys_transposed);
    load_biases(inputs(), batch, tile.first_head, list, run, key_tile<E>, meeting.bias);
    meeting.compute_probabilities(rows, sizes().head_dim, scratch.queries_left, scratch.keys_transposed, inputs().scale,
                                  [&](int64_t row, int64_t key, vec<A>(&probabilities)[tile_vectors]) {
                                    seen.template hide<A>(row, key, probabilities, A(0));
                                  });
    const auto sums_of = [&](A* sums, int64_t sum_columns) {
      return [this, &run, sums, sum_columns](int64_t key) {
        return key < run.count ? sums + (run.keys[key] - for_keys->range.begin) * sum_columns : nullptr;
      };
    };
    if (for_keys != nullptr && args.grad_value.data != nullptr) {
      meeting.add_to_values(rows, value_columns(), scratch.grads, sums_of(for_keys->values, value_columns()));
    }
    if (args.delta == nullptr) {
      return;  // no gradient to scores is wanted
    }
    if (sizes().value_dim > 0) {
      pack_transposed(ListedRows<T>(inputs().value, batch, kv_head, run), sizes().value_dim, key_tile<E>,
                      scratch.values_transposed);
    }
    meeting.compute_score_grads(rows, sizes().value_dim, scratch.grads_left, scratch.values_transposed);
    if (for_keys != nullptr && args.grad_key.data != nullptr) {
      meeting.add_to_keys(rows, columns(), scratch.queries, sums_of(for_keys->keys, columns()));
    }
    if (for_keys != nullptr && args.grad_key_bias != nullptr) {
      clear(scratch.bias_sums, key_tile<E>);
      meeting.add_to_biases(0, tile.num_rows(), scratch.bias_sums);
      for (int64_t e = 0; e < run.count; ++e) {
        for_keys->bias[run.keys[e] - for_keys->range.begin] += scratch.bias_sums[e];
      }
    }
    for (int64_t in_tile = 0; for_queries && args.grad_pair_bias != nullptr && in_tile < tile.num_heads; ++in_tile) {
      A* const to = args.grad_biases_of(batch, tile.first_head + in_tile, list);
      clear(scratch.bias_sums, key_tile<E>);
      meeting.add_to_biases(in_tile * tile.num_queries, (in_tile + 1) * tile.num_queries, scratch.bias_sums);
      for (int64_t e = 0; e < run.count; ++e) {
        to[run.places[e]] += scratch.bias_sums[e];
      }
    }
    if (for_queries && args.grad_query.data != nullptr) {
      pack_right(keys, sizes().head_dim, key_tile<E>, scratch.keys);
      meeting.add_to_queries(rows, columns(), scratch.keys, scratch.query_sums);
    }
  }
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
