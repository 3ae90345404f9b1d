#include "sparse_attention/cpu/scores_kernel.h"

#include "core/attention/cpu/tile_gradients.h"
#include "sparse_attention/cpu/column_walk.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {
namespace {

// At most most_rows queries of one head.
struct QueriesOfTile {
  int64_t batch;
  int64_t head;
  int64_t first;
  int64_t count;
};

QueriesOfTile queries_of_tile(const Sizes& sizes, int64_t batch, int64_t head, int64_t tile) {
  const int64_t first = tile * most_rows;
  return {batch, head, first, smaller(sizes.num_queries - first, most_rows)};
}

QueriesOfTile queries_of_unit(const Sizes& sizes, int64_t unit) {
  const int64_t tiles = score_tiles(sizes), head = unit / tiles;
  return queries_of_tile(sizes, head / sizes.num_heads, head % sizes.num_heads, balanced_tile(unit % tiles, tiles));
}

template <typename T>
RowsByNumber<T> keys_of(const Attention<T>& inputs, const QueriesOfTile& tile) {
  return {inputs.key.row(tile.batch, tile.head / inputs.sizes.group_size(), 0), inputs.key.row_stride};
}

// Calls body(row, columns) for what the queries of a tile have of keys of `range`.
template <typename T, typename Body>
void for_columns_of_tile(const ColumnWalk<T>& walk, const QueriesOfTile& tile, Range range, const Body& body) {
  for (int64_t row = 0; row < tile.count; ++row) {
    walk.start(row, tile.batch, tile.head, tile.first + row);
  }
  walk.for_columns(tile.count, range, body);
}

template <typename T>
struct ScoresScratch {
  using E = multiplicand_t<T>;
  using Vector = typename element<E>::vector;

  ColumnWalk<T> walk;
  Vector* queries;     // [most_rows][vectors_of(D)]
  sum_t<E>* products;  // [most_keys]

  ScoresScratch(Arena* arena, const Attention<T>& inputs) : walk(arena, inputs) {
    queries = arena->take<Vector>(most_rows * vectors_of<E>(inputs.sizes.head_dim));
    products = arena->take<sum_t<E>>(most_keys);
  }
};

// Gradients to columns in one place, as weights of rows.
template <typename T>
struct ColumnGrads {
  using A = accumulate_t<T>;

  A* grads;  // [most_keys]

  explicit ColumnGrads(Arena* arena) : grads(arena->take<A>(most_keys)) {}

  const A* load(const A* row, const Columns& columns) const {
    for (int64_t e = 0; e < columns.count; ++e) {
      grads[e] = row[columns.columns[e]];
    }
    return grads;
  }
};

template <typename T>
struct QueryGradientScratch {
  ColumnWalk<T> walk;
  ColumnGrads<T> grads;
  accumulate_t<T>* sums;  // [most_rows][D, whole vectors], without the scale

  QueryGradientScratch(Arena* arena, const Attention<T>& inputs) : walk(arena, inputs), grads(arena) {
    sums = arena->take<accumulate_t<T>>(most_rows * round_up(inputs.sizes.head_dim, lanes<accumulate_t<T>>));
  }
};

template <typename T>
struct KeyGradientScratch {
  using A = accumulate_t<T>;

  ColumnWalk<T> walk;
  ColumnGrads<T> grads;
  A* queries;         // [most_rows][D, whole vectors]
  A* sums;            // [keys of the range][D, whole vectors], without the scale
  int32_t* in_range;  // [most_keys]: keys, counted from the range's first

  KeyGradientScratch(Arena* arena, const Attention<T>& inputs, int64_t num_keys) : walk(arena, inputs), grads(arena) {
    const int64_t columns = round_up(inputs.sizes.head_dim, lanes<A>);
    queries = arena->take<A>(most_rows * columns);
    sums = arena->take<A>(num_keys * columns);
    in_range = arena->take<int32_t>(most_keys);
  }
};

template <typename Scratch, typename... Arguments>
int64_t bytes_of(const Arguments&... arguments) {
  Arena arena(nullptr);
  Scratch(&arena, arguments...);
  return arena.bytes();
}

}  // namespace

int64_t score_tiles(const Sizes& sizes) {
  return divide_up(sizes.num_queries, most_rows);
}

template <typename T>
int64_t scores_scratch_bytes(const Attention<T>& inputs) {
  return bytes_of<ScoresScratch<T>>(inputs);
}

template <typename T>
void scores(const Scores<T>& args, void* scratch, int64_t begin, int64_t end) {
  using E = multiplicand_t<T>;
  using A = sum_t<E>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t vectors = vectors_of<E>(sizes.head_dim);
  Arena arena(scratch);
  const ScoresScratch<T> buffers(&arena, inputs);
  for (int64_t unit = begin; unit < end; ++unit) {
    const QueriesOfTile tile = queries_of_unit(sizes, unit);
    const RowsByNumber<T> keys = keys_of(inputs, tile);
    const auto scores_of = [&](int64_t row) { return args.scores.row(tile.batch, tile.head, tile.first + row); };
    for (int64_t row = 0; row < tile.count; ++row) {
      load_row<E>(inputs.query.row(tile.batch, tile.head, tile.first + row), sizes.head_dim,
                  buffers.queries + row * vectors);
      A* const to = scores_of(row);
      for (int64_t column = 0; column < num_columns(inputs); ++column) {
        to[column] = -static_cast<A>(__builtin_inf());
      }
    }
    for_columns_of_tile(buffers.walk, tile, Range{0, sizes.num_keys}, [&](int64_t row, const Columns& columns) {
      products_with_rows<E>(buffers.queries + row * vectors, keys, sizes.head_dim, columns.keys, columns.count,
                            RowsByNumber<T>{}, 0, buffers.products);
      A* const to = scores_of(row);
      for (int64_t e = 0; e < columns.count; ++e) {
        to[columns.columns[e]] = buffers.products[e] * inputs.scale;
      }
    });
  }
}

template <typename T>
int64_t score_query_gradient_scratch_bytes(const Attention<T>& inputs) {
  return bytes_of<QueryGradientScratch<T>>(inputs);
}

template <typename T>
void score_query_gradient(const ScoreGradients<T>& args, void* scratch, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t columns = round_up(sizes.head_dim, lanes<A>);
  Arena arena(scratch);
  const QueryGradientScratch<T> buffers(&arena, inputs);
  for (int64_t unit = begin; unit < end; ++unit) {
    const QueriesOfTile tile = queries_of_unit(sizes, unit);
    const RowsByNumber<T> keys = keys_of(inputs, tile);
    clear(buffers.sums, tile.count * columns);
    for_columns_of_tile(buffers.walk, tile, Range{0, sizes.num_keys}, [&](int64_t row, const Columns& of_row) {
      const A* const grads = buffers.grads.load(args.grad.row(tile.batch, tile.head, tile.first + row), of_row);
      add_weighted_rows(keys, sizes.head_dim, of_row.keys, grads, of_row.count, A(1), buffers.sums + row * columns);
    });
    for (int64_t row = 0; row < tile.count; ++row) {
      store_gradient(args.grad_query.row(tile.batch, tile.head, tile.first + row), buffers.sums + row * columns,
                     sizes.head_dim, inputs.scale);
    }
  }
}

template <typename T>
int64_t score_key_gradient_scratch_bytes(const Attention<T>& inputs, int64_t keys_at_a_time) {
  return bytes_of<KeyGradientScratch<T>>(inputs, keys_at_a_time);
}

template <typename T>
void score_key_gradient(const ScoreGradients<T>& args, int64_t keys_at_a_time, void* scratch, int64_t begin,
                        int64_t end) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t columns = round_up(sizes.head_dim, lanes<A>);
  const int64_t ranges = divide_up(sizes.num_keys, keys_at_a_time);
  Arena arena(scratch);
  const KeyGradientScratch<T> buffers(&arena, inputs, keys_at_a_time);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / ranges / sizes.num_kv_heads, kv_head = unit / ranges % sizes.num_kv_heads;
    const int64_t first = unit % ranges * keys_at_a_time;
    const Range range{first, smaller(first + keys_at_a_time, sizes.num_keys)};
    clear(buffers.sums, (range.end - range.begin) * columns);
    const int64_t group = sizes.group_size(), tiles = score_tiles(sizes);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t number = 0; number < tiles; ++number) {
        const QueriesOfTile tile = queries_of_tile(sizes, batch, head, number);
        for (int64_t row = 0; row < tile.count; ++row) {
          load_numbers(inputs.query.row(batch, head, tile.first + row), sizes.head_dim, buffers.queries + row * columns);
        }
        for_columns_of_tile(buffers.walk, tile, range, [&](int64_t row, const Columns& of_row) {
          const A* const grads = buffers.grads.load(args.grad.row(batch, head, tile.first + row), of_row);
          for (int64_t e = 0; e < of_row.count; ++e) {
            buffers.in_range[e] = of_row.keys[e] - static_cast<int32_t>(range.begin);
          }
          add_to_rows(buffers.sums, columns / lanes<A>, buffers.in_range, grads, of_row.count,
                      buffers.queries + row * columns);
        });
      }
    }
    for (int64_t key = range.begin; key < range.end; ++key) {
      store_gradient(args.grad_key.row(batch, kv_head, key), buffers.sums + (key - range.begin) * columns,
                     sizes.head_dim, inputs.scale);
    }
  }
}

#define TORCHOPS_INSTANTIATE(T)                                                                \
  template int64_t scores_scratch_bytes(const Attention<T>&);                                  \
  template void scores(const Scores<T>&, void*, int64_t, int64_t);                             \
  template int64_t score_query_gradient_scratch_bytes(const Attention<T>&);                    \
  template void score_query_gradient(const ScoreGradients<T>&, void*, int64_t, int64_t);       \
  template int64_t score_key_gradient_scratch_bytes(const Attention<T>&, int64_t);             \
  template void score_key_gradient(const ScoreGradients<T>&, int64_t, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
