#pragma once

#include "core/attention/cpu/tile_gradients.h"
#include "sparse_attention/cpu/column_walk.h"
#include "sparse_attention/cpu/list_tile.h"

// Scores and their gradients where several queries share a list: its keys are gathered once for a tile of them, and
// multiplied as matrices.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename T>
class ListScores {
 public:
  using A = accumulate_t<T>;

  ListScores(Arena* arena, const Attention<T>& inputs) : inputs_(inputs), walk_(arena, inputs), meeting_(arena) {
    const int64_t head_dim = inputs.sizes.head_dim;
    queries_left_ = arena->take<E>(query_tile * left_stride<E>(head_dim));
    queries_ = arena->take<E>(depth_of<E>(query_tile) * padded_dim());
    keys_transposed_ = arena->take<E>(key_tile<E> * depth_of<E>(head_dim));
    keys_ = arena->take<E>(depth_of<E>(key_tile<E>) * padded_dim());
    query_sums_ = arena->take<A>(query_tile * padded_dim());
    ends_ = arena->take<int64_t>(query_tile);
  }

  // Lists of the heads that share them.
  static int64_t units(const Attention<T>& inputs) {
    return inputs.sizes.batch * (inputs.sizes.num_heads / inputs.heads_of_list()) * inputs.lists.num_lists;
  }

  void compute_scores(const Scores<T>& args, int64_t unit) const {
    for_tiles_of_unit(unit, [&](const ListTile& tile) {
      pack_left(ListTile::Rows<T>{tile, inputs_.query, tile.first_query}, sizes().head_dim, padded_rows(tile),
                queries_left_);
      for (int64_t row = 0; row < tile.num_rows(); ++row) {
        hide_columns(args.scores.row(tile.batch, tile.head_of(row), tile.query_of(row)), num_columns(inputs_));
      }
      for_columns(tile, Range{0, sizes().num_keys}, [&](const Columns& columns) {
        multiply(tile, columns);
        store_scores(args, tile, columns);
      });
    });
  }

  void compute_query_gradient(const ScoreGradients<T>& args, int64_t unit) const {
    for_tiles_of_unit(unit, [&](const ListTile& tile) {
      clear(query_sums_, padded_rows(tile) * padded_dim());
      for_columns(tile, Range{0, sizes().num_keys}, [&](const Columns& columns) {
        load_grads(args, tile, columns);
        with_rows_of_keys(tile, columns,
                          [&](const ListedRows<T>& rows) { pack_right(rows, sizes().head_dim, key_tile<E>, keys_); });
        meeting_.add_to_queries(padded_rows(tile), padded_dim(), keys_, query_sums_);
      });
      for (int64_t row = 0; row < tile.num_rows(); ++row) {
        store_gradient(args.grad_query.row(tile.batch, tile.head_of(row), tile.query_of(row)),
                       query_sums_ + row * padded_dim(), sizes().head_dim, inputs_.scale);
      }
    });
  }

  // To sums [range][D, whole vectors] of the keys of a key-value head, without the scale.
  void add_to_keys(const ScoreGradients<T>& args, int64_t batch, int64_t kv_head, Range range, A* sums) const {
    const int64_t group = sizes().group_size(), heads = inputs_.heads_of_list();
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head += heads) {
      for (int64_t list = 0; list < inputs_.lists.num_lists; ++list) {
        for_tiles(inputs_, batch, head, list, [&](const ListTile& tile) {
          pack_right(ListTile::Rows<T>{tile, inputs_.query, first_seeing(tile)}, sizes().head_dim, padded_rows(tile),
                     queries_);
          for_columns(tile, range, [&](const Columns& columns) {
            load_grads(args, tile, columns);
            meeting_.add_to_keys(padded_rows(tile), padded_dim(), queries_, [&](int64_t e) {
              return e < columns.count ? sums + (columns.keys[e] - range.begin) * padded_dim() : nullptr;
            });
          });
        });
      }
    }
  }

 private:
  using E = multiplicand_t<T>;

  const Sizes& sizes() const { return inputs_.sizes; }
  int64_t padded_dim() const { return columns_of<E>(sizes().head_dim); }
  static int64_t padded_rows(const ListTile& tile) { return round_up(tile.num_rows(), tile_rows); }

  template <typename Body>
  void for_tiles_of_unit(int64_t unit, const Body& body) const {
    const int64_t lists = inputs_.lists.num_lists, heads = inputs_.heads_of_list();
    const int64_t groups = sizes().num_heads / heads;
    for_tiles(inputs_, unit / lists / groups, unit / lists % groups * heads, balanced_tile(unit % lists, lists), body);
  }

  // Calls body(columns) for those of the list that have keys of `range` which the last query of the tile sees.
  template <typename Body>
  void for_columns(const ListTile& tile, Range range, const Body& body) const {
    const Sequence sequence = inputs_.sequence(tile.batch);
    for (int64_t row = 0; row < tile.num_rows(); ++row) {
      ends_[row] = end_of_keys(inputs_.rule, sequence, tile.query_of(row));
    }
    walk_.start(0, tile.batch, tile.first_head, tile.last_query());
    const auto next = [&] { return walk_.next(0, sizes().num_keys, range, key_tile<E>); };
    for (Columns columns = next(); columns.count > 0; columns = next()) {
      body(columns);
    }
  }

  // Queries that see nothing of the list may hold anything. Which part of it a range of keys leaves does not count.
  int64_t first_seeing(const ListTile& tile) const {
    const Sequence sequence = inputs_.sequence(tile.batch);
    walk_.start(0, tile.batch, tile.first_head, tile.last_query());
    return tile.first_seeing(inputs_.rule, sequence, walk_.first_key(0));
  }

  template <typename Body>
  void with_rows_of_keys(const ListTile& tile, const Columns& columns, const Body& body) const {
    const Run run{columns.keys, columns.columns, columns.count};
    body(ListedRows<T>(inputs_.key, tile.batch, tile.first_head / sizes().group_size(), run));
  }

  // Scores of all queries of the tile, [query_tile][key_tile].
  void multiply(const ListTile& tile, const Columns& columns) const {
    constexpr int64_t panel = panel_columns<A>;
    const int64_t num_keys = round_up(columns.count, panel), depth = depth_of<E>(sizes().head_dim);
    with_rows_of_keys(tile, columns, [&](const ListedRows<T>& rows) {
      pack_transposed(rows, sizes().head_dim, num_keys, keys_transposed_);
    });
    for (int64_t first = 0; first < num_keys; first += panel) {
      panel_product(padded_rows(tile), depth, Operand<E>{queries_left_, left_stride<E>(sizes().head_dim), 1},
                    keys_transposed_ + first * depth, [&](int64_t row, const vec<A>(&products)[tile_vectors]) {
                      A* const to = meeting_.score_grads + row * key_tile<E> + first;
                      for (int v = 0; v < tile_vectors; ++v) {
                        store(to + v * lane_count<E>, products[v] * inputs_.scale);
                      }
                    });
    }
  }

  void store_scores(const Scores<T>& args, const ListTile& tile, const Columns& columns) const {
    const int64_t count = columns.count, first = columns.columns[0];
    const bool in_one_place = columns.columns[count - 1] - first == count - 1;
    int32_t last_key = 0;
    for (int64_t e = 0; e < count; ++e) {
      last_key = columns.keys[e] > last_key ? columns.keys[e] : last_key;
    }
    for (int64_t row = 0; row < tile.num_rows(); ++row) {
      const A* const from = meeting_.score_grads + row * key_tile<E>;
      A* const to = args.scores.row(tile.batch, tile.head_of(row), tile.query_of(row));
      if (in_one_place && last_key < ends_[row]) {
        __builtin_memcpy(to + first, from, static_cast<size_t>(count) * sizeof(A));
        continue;
      }
      for (int64_t e = 0; e < count; ++e) {
        if (columns.keys[e] < ends_[row]) {
          to[columns.columns[e]] = from[e];
        }
      }
    }
  }

  // Gradients to columns, 0 where a query does not see the key, [padded rows][key_tile].
  void load_grads(const ScoreGradients<T>& args, const ListTile& tile, const Columns& columns) const {
    clear(meeting_.score_grads, padded_rows(tile) * key_tile<E>);
    for (int64_t row = 0; row < tile.num_rows(); ++row) {
      const A* const from = args.grad.row(tile.batch, tile.head_of(row), tile.query_of(row));
      A* const to = meeting_.score_grads + row * key_tile<E>;
      for (int64_t e = 0; e < columns.count; ++e) {
        to[e] = columns.keys[e] < ends_[row] ? from[columns.columns[e]] : A(0);
      }
    }
  }

  const Attention<T>& inputs_;
  ColumnWalk<T> walk_;  // of one list
  Meeting<E> meeting_;
  E* queries_left_;     // left operand [query_tile][D]
  E* queries_;          // right operand [query_tile][D]
  E* keys_transposed_;  // panels [key_tile / panel][D][panel]
  E* keys_;             // right operand [key_tile][D]
  A* query_sums_;       // [query_tile][D, whole vectors], without the scale
  int64_t* ends_;       // [query_tile]: behind the keys that a row sees
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
