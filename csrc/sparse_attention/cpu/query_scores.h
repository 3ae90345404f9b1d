#pragma once

#include "core/attention/cpu/tile_gradients.h"
#include "sparse_attention/cpu/column_walk.h"

// Scores and their gradients query by query, where few queries share a list.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

template <typename T>
class QueryScores {
 public:
  using A = accumulate_t<T>;

  QueryScores(Arena* arena, const Attention<T>& inputs) : inputs_(inputs), walk_(arena, inputs) {
    queries_ = arena->take<Vector>(most_rows * vectors_of<E>(inputs.sizes.head_dim));
    rows_ = arena->take<A>(most_rows * padded_dim());
    numbers_ = arena->take<A>(most_keys);
    in_range_ = arena->take<int32_t>(most_keys);
  }

  // Tiles of the queries of a head.
  static int64_t units(const Attention<T>& inputs) {
    return inputs.sizes.batch * inputs.sizes.num_heads * tiles(inputs.sizes);
  }

  void compute_scores(const Scores<T>& args, int64_t unit) const {
    const Tile tile = tile_of(unit);
    const RowsByNumber<T> keys = keys_of(tile);
    const int64_t vectors = vectors_of<E>(sizes().head_dim);
    for (int64_t row = 0; row < tile.count; ++row) {
      load_row<E>(inputs_.query.row(tile.batch, tile.head, tile.first + row), sizes().head_dim,
                  queries_ + row * vectors);
      hide_columns(args.scores.row(tile.batch, tile.head, tile.first + row), num_columns(inputs_));
    }
    for_columns(tile, Range{0, sizes().num_keys}, [&](int64_t row, const Columns& columns) {
      products_with_rows<E>(queries_ + row * vectors, keys, sizes().head_dim, columns.keys, columns.count,
                            RowsByNumber<T>{}, 0, numbers_);
      A* const to = args.scores.row(tile.batch, tile.head, tile.first + row);
      for (int64_t e = 0; e < columns.count; ++e) {
        to[columns.columns[e]] = numbers_[e] * inputs_.scale;
      }
    });
  }

  void compute_query_gradient(const ScoreGradients<T>& args, int64_t unit) const {
    const Tile tile = tile_of(unit);
    const RowsByNumber<T> keys = keys_of(tile);
    clear(rows_, tile.count * padded_dim());
    for_columns(tile, Range{0, sizes().num_keys}, [&](int64_t row, const Columns& columns) {
      load_grads(args, tile, row, columns);
      add_weighted_rows(keys, sizes().head_dim, columns.keys, numbers_, columns.count, A(1),
                        rows_ + row * padded_dim());
    });
    for (int64_t row = 0; row < tile.count; ++row) {
      store_gradient(args.grad_query.row(tile.batch, tile.head, tile.first + row), rows_ + row * padded_dim(),
                     sizes().head_dim, inputs_.scale);
    }
  }

  // To sums [range][D, whole vectors] of the keys of a key-value head, without the scale.
  void add_to_keys(const ScoreGradients<T>& args, int64_t batch, int64_t kv_head, Range range, A* sums) const {
    const int64_t group = sizes().group_size();
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t number = 0; number < tiles(sizes()); ++number) {
        const Tile tile(sizes(), batch, head, number);
        for (int64_t row = 0; row < tile.count; ++row) {
          load_numbers(inputs_.query.row(batch, head, tile.first + row), sizes().head_dim, rows_ + row * padded_dim());
        }
        for_columns(tile, range, [&](int64_t row, const Columns& columns) {
          load_grads(args, tile, row, columns);
          for (int64_t e = 0; e < columns.count; ++e) {
            in_range_[e] = columns.keys[e] - static_cast<int32_t>(range.begin);
          }
          add_to_rows(sums, padded_dim() / lanes<A>, in_range_, numbers_, columns.count, rows_ + row * padded_dim());
        });
      }
    }
  }

 private:
  using E = multiplicand_t<T>;
  using Vector = typename element<E>::vector;

  // At most most_rows queries of one head.
  struct Tile {
    int64_t batch;
    int64_t head;
    int64_t first;
    int64_t count;

    Tile(const Sizes& sizes, int64_t batch, int64_t head, int64_t number)
        : batch(batch),
          head(head),
          first(number * most_rows),
          count(smaller(sizes.num_queries - number * most_rows, most_rows)) {}
  };

  const Sizes& sizes() const { return inputs_.sizes; }
  int64_t padded_dim() const { return round_up(sizes().head_dim, lanes<A>); }
  static int64_t tiles(const Sizes& sizes) { return divide_up(sizes.num_queries, most_rows); }

  Tile tile_of(int64_t unit) const {
    const int64_t of_head = tiles(sizes()), head = unit / of_head;
    return {sizes(), head / sizes().num_heads, head % sizes().num_heads, balanced_tile(unit % of_head, of_head)};
  }
  RowsByNumber<T> keys_of(const Tile& tile) const {
    return {inputs_.key.row(tile.batch, tile.head / sizes().group_size(), 0), inputs_.key.row_stride};
  }

  // Calls body(row, columns) for all columns that have keys of `range`: a query's in ascending order, and a key's in an
  // order that does not depend on the range. A list that ascends is gone through stretch by stretch of keys, which stay
  // in a cache meanwhile, and another one as far as it does not leave the stretch behind.
  template <typename Body>
  void for_columns(const Tile& tile, Range range, const Body& body) const {
    for (int64_t row = 0; row < tile.count; ++row) {
      walk_.start(row, tile.batch, tile.head, tile.first + row);
    }
    const int64_t stretch = stretch_of_keys(inputs_), num_keys = sizes().num_keys;
    for (int64_t end = range.begin / stretch * stretch + stretch; end < num_keys + stretch; end += stretch) {
      for (int64_t row = 0; row < tile.count; ++row) {
        const auto next = [&] { return walk_.next(row, end, range, most_keys); };
        for (Columns columns = next(); columns.count > 0; columns = next()) {
          body(row, columns);
        }
      }
    }
  }

  void load_grads(const ScoreGradients<T>& args, const Tile& tile, int64_t row, const Columns& columns) const {
    const A* const from = args.grad.row(tile.batch, tile.head, tile.first + row);
    for (int64_t e = 0; e < columns.count; ++e) {
      numbers_[e] = from[columns.columns[e]];
    }
  }

  const Attention<T>& inputs_;
  ColumnWalk<T> walk_;
  Vector* queries_;    // [most_rows][vectors_of(D)]
  A* rows_;            // [most_rows][D, whole vectors]: queries, or what they add up
  A* numbers_;         // [most_keys]: products or gradients of columns
  int32_t* in_range_;  // [most_keys]: keys, counted from the range's first
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
