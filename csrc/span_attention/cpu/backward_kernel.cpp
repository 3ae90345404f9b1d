#include "span_attention/cpu/backward_kernel.h"

#include "core/attention/cpu/packing.h"
#include "core/attention/cpu/tile_gradients.h"
#include "span_attention/cpu/tiles.h"

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {
namespace {

// One key-value head and its query heads, packed.
template <typename E>
struct Pack {
  E* keys_transposed;    // panels [Lk / panel][D][panel]
  E* values_transposed;  // panels [Lk / panel][Dv][panel]
  E* keys;               // right operand [Lk][D]
  E* queries_left;       // left operand [group][Lq][D]
  E* queries;            // right operand [group][Lq][D], the same where E is no pair
  E* grads_left;         // left operand [group][Lq][Dv]: grad_output
  E* grads;              // right operand [group][Lq][Dv]

  Pack(Arena* arena, const Sizes& sizes) {
    const int64_t num_keys = round_up(sizes.num_keys, key_tile<E>);
    const int64_t num_queries = sizes.group_size() * round_up(sizes.num_queries, query_tile);
    keys_transposed = arena->take<E>(num_keys * depth_of<E>(sizes.head_dim));
    values_transposed = arena->take<E>(num_keys * depth_of<E>(sizes.value_dim));
    keys = arena->take<E>(depth_of<E>(num_keys) * columns_of<E>(sizes.head_dim));
    queries = arena->take<E>(depth_of<E>(num_queries) * columns_of<E>(sizes.head_dim));
    grads = arena->take<E>(depth_of<E>(num_queries) * columns_of<E>(sizes.value_dim));
    queries_left = is_pair<E> ? arena->take<E>(num_queries * left_stride<E>(sizes.head_dim)) : queries;
    grads_left = is_pair<E> ? arena->take<E>(num_queries * left_stride<E>(sizes.value_dim)) : grads;
  }
};

// Sums for a tile of keys.
template <typename E>
struct KeySums {
  using A = sum_t<E>;

  A* keys;    // [key_tile][D], without the scale
  A* values;  // [key_tile][Dv]
  A* bias;    // [key_tile]

  KeySums(Arena* arena, const Sizes& sizes) {
    keys = arena->take<A>(key_tile<E> * columns_of<E>(sizes.head_dim));
    values = arena->take<A>(key_tile<E> * columns_of<E>(sizes.value_dim));
    bias = arena->take<A>(key_tile<E>);
  }
};

// One key-value head of the batch, and the steps of its backward.
template <typename T>
struct Head {
  using E = multiplicand_t<T>;
  using A = sum_t<E>;

  const AttentionBackward<T>& args;
  int64_t batch;
  int64_t kv_head;
  Pack<E> pack;
  Sequence sequence;

  Head(const AttentionBackward<T>& backward, int64_t first_head, void* packs, int64_t in_wave)
      : args(backward),
        batch((first_head + in_wave) / sizes().num_kv_heads),
        kv_head((first_head + in_wave) % sizes().num_kv_heads),
        pack(pack_of(packs, in_wave, sizes())),
        sequence(backward.inputs.sequence(batch)) {}

  static Pack<E> pack_of(void* packs, int64_t in_wave, const Sizes& sizes) {
    Arena arena(static_cast<char*>(packs) + in_wave * backward_pack_bytes<T>(sizes));
    return Pack<E>(&arena, sizes);
  }

  const Sizes& sizes() const { return args.inputs.sizes; }
  int64_t head(int64_t in_group) const { return kv_head * sizes().group_size() + in_group; }
  bool wants_query() const { return args.grad_query.data != nullptr; }
  bool wants_scores_by_key() const { return args.grad_key.data != nullptr || args.grad_key_bias != nullptr; }
  int64_t query_columns() const { return columns_of<E>(sizes().head_dim); }
  int64_t value_columns() const { return columns_of<E>(sizes().value_dim); }
  // Rows of a head's packed queries.
  int64_t padded_queries() const { return round_up(sizes().num_queries, query_tile); }
  int64_t num_rows(int64_t first_query) const {
    const int64_t left = sizes().num_queries - first_query;
    return left < query_tile ? left : query_tile;
  }
  Range key_range(int64_t first_key) const {
    const int64_t end = first_key + key_tile<E>;
    return {first_key, end < sizes().num_keys ? end : sizes().num_keys};
  }

  // Probabilities and the gradients to scores, and their sums for the queries and for the keys of the tiles
  // where those are given.
  void meet(const Meeting<E>& meeting, int64_t in_group, int64_t first_query, int64_t first_key, A* query_sums,
            const KeySums<E>* key_sums) const {
    const int64_t rows = round_up(num_rows(first_query), tile_rows);
    load_queries(meeting, in_group, first_query, rows);
    load_key_bias(args.inputs, batch, first_key, key_tile<E>, meeting.bias);
    compute_probabilities(meeting, in_group, first_query, first_key, rows);
    const int64_t packed_row = in_group * padded_queries() + first_query;
    if (key_sums != nullptr && args.grad_value.data != nullptr) {
      meeting.add_to_values(rows, value_columns(), pack.grads + packed_row / element<E>::depth * value_columns(),
                            SumsInOrder<A>{key_sums->values, value_columns()});
    }
    const bool for_keys = key_sums != nullptr && wants_scores_by_key();
    if (!for_keys && query_sums == nullptr) {
      return;
    }
    meeting.compute_score_grads(rows, sizes().value_dim,
                                pack.grads_left + packed_row * left_stride<E>(sizes().value_dim),
                                pack.values_transposed + first_key * depth_of<E>(sizes().value_dim));
    if (for_keys) {
      if (args.grad_key.data != nullptr) {
        meeting.add_to_keys(rows, query_columns(), pack.queries + packed_row / element<E>::depth * query_columns(),
                            SumsInOrder<A>{key_sums->keys, query_columns()});
      }
      if (args.grad_key_bias != nullptr) {
        meeting.add_to_biases(0, num_rows(first_query), key_sums->bias);
      }
    }
    if (query_sums != nullptr) {
      meeting.add_to_queries(rows, query_columns(), pack.keys + first_key / element<E>::depth * query_columns(),
                             query_sums);
    }
  }

  void store_query_grads(int64_t in_group, int64_t first_query, const A* sums) const {
    for (int64_t row = 0; row < num_rows(first_query); ++row) {
      store_gradient(args.grad_query.row(batch, head(in_group), first_query + row), sums + row * query_columns(),
                     sizes().head_dim, args.inputs.scale);
    }
  }

  void store_key_grads(int64_t first_key, const KeySums<E>& sums) const {
    store_key_gradients(args, batch, kv_head, key_range(first_key), sums, query_columns(), value_columns());
  }

  void clear_key_sums(const KeySums<E>& sums) const {
    clear(sums.keys, key_tile<E> * query_columns());
    clear(sums.values, key_tile<E> * value_columns());
    clear(sums.bias, key_tile<E>);
  }

 private:
  void load_queries(const Meeting<E>& meeting, int64_t in_group, int64_t first_query, int64_t rows) const {
    load_normalizers(args, batch, head(in_group), Range{first_query, first_query + num_rows(first_query)}, rows,
                     meeting.largest, meeting.inverse_sum, meeting.delta);
  }

  void compute_probabilities(const Meeting<E>& meeting, int64_t in_group, int64_t first_query, int64_t first_key,
                             int64_t rows) const {
    const Attention<T>& inputs = args.inputs;
    const int64_t last_query = first_query + num_rows(first_query) - 1;
    const E* const queries =
        pack.queries_left + (in_group * padded_queries() + first_query) * left_stride<E>(sizes().head_dim);
    const E* const keys = pack.keys_transposed + first_key * depth_of<E>(sizes().head_dim);
    if (visible_keys(inputs.span, sequence, last_query).begin <= first_key &&
        first_key + key_tile<E> <= visible_keys(inputs.span, sequence, first_query).end) {
      meeting.compute_probabilities(rows, sizes().head_dim, queries, keys, inputs.scale, [](auto...) {});
    } else {
      const TileSpans spans(inputs.span, sequence, first_query, num_rows(first_query));
      meeting.compute_probabilities(rows, sizes().head_dim, queries, keys, inputs.scale,
                                    [&](int64_t row, int64_t key, vec<A>(&probabilities)[tile_vectors]) {
                                      spans.template hide<A>(row, first_key + key, probabilities, A(0));
                                    });
    }
  }
};

}  // namespace

template <typename T>
int64_t backward_pack_bytes(const Sizes& sizes) {
  Arena arena(nullptr);
  Pack<multiplicand_t<T>>(&arena, sizes);
  return arena.bytes();
}

template <typename T>
int64_t backward_query_units(const Sizes& sizes) {
  return sizes.group_size() * divide_up(sizes.num_queries, query_tile);
}

template <typename T>
int64_t backward_key_units(const Sizes& sizes) {
  return divide_up(sizes.num_keys, key_tile<multiplicand_t<T>>);
}

template <typename T>
int64_t backward_pack_units(const Sizes& sizes) {
  return backward_key_units<T>(sizes) + backward_query_units<T>(sizes);
}

template <typename T>
void backward_pack(const AttentionBackward<T>& args, int64_t first_head, void* packs, int64_t begin, int64_t end) {
  using E = multiplicand_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int64_t units = backward_pack_units<T>(sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Head<T> head(args, first_head, packs, unit / units);
    const Pack<E>& pack = head.pack;
    const int64_t in_head = unit % units;
    if (in_head < backward_key_units<T>(sizes)) {
      const int64_t key = in_head * key_tile<E>;
      const Range seen = visible_keys(inputs.span, head.sequence, Range{0, sizes.num_queries}).within(key, key_tile<E>);
      const RowsInOrder<T> rows{inputs.key.row(head.batch, head.kv_head, key), inputs.key.row_stride, seen};
      pack_transposed(rows, sizes.head_dim, key_tile<E>, pack.keys_transposed + key * depth_of<E>(sizes.head_dim));
      pack_right(rows, sizes.head_dim, key_tile<E>, pack.keys + key / element<E>::depth * head.query_columns());
      if (inputs.value.data != nullptr) {
        pack_transposed(RowsInOrder<T>{inputs.value.row(head.batch, head.kv_head, key), inputs.value.row_stride, seen},
                        sizes.value_dim, key_tile<E>, pack.values_transposed + key * depth_of<E>(sizes.value_dim));
      }
    } else {
      const int64_t tiles = divide_up(sizes.num_queries, query_tile);
      const int64_t in_group = (in_head - backward_key_units<T>(sizes)) / tiles;
      const int64_t query = (in_head - backward_key_units<T>(sizes)) % tiles * query_tile;
      const int64_t packed_row = in_group * head.padded_queries() + query;
      const Range seeing =
          visible_queries(inputs.span, head.sequence, Range{0, sizes.num_keys}).within(query, query_tile);
      const auto pack_rows = [&](const Heads<const T>& tensor, int64_t size, E* left, E* right) {
        const RowsInOrder<T> rows{tensor.row(head.batch, head.head(in_group), query), tensor.row_stride, seeing};
        pack_right(rows, size, query_tile, right + packed_row / element<E>::depth * columns_of<E>(size));
        if constexpr (is_pair<E>) {
          pack_left(rows, size, query_tile, left + packed_row * left_stride<E>(size));
        }
      };
      pack_rows(inputs.query, sizes.head_dim, pack.queries_left, pack.queries);
      if (sizes.value_dim > 0) {
        pack_rows(args.grad_output, sizes.value_dim, pack.grads_left, pack.grads);
      }
    }
  }
}

template <typename T>
int64_t backward_scratch_bytes(const Sizes& sizes, bool whole_heads) {
  using E = multiplicand_t<T>;
  Arena arena(nullptr);
  Meeting<E>{&arena};
  KeySums<E>(&arena, sizes);
  const int64_t rows = whole_heads ? sizes.group_size() * round_up(sizes.num_queries, query_tile) : query_tile;
  arena.take<sum_t<E>>(rows * columns_of<E>(sizes.head_dim));
  return arena.bytes();
}

template <typename T>
void backward_heads(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin,
                    int64_t end) {
  using E = multiplicand_t<T>;
  const Sizes& sizes = args.inputs.sizes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Head<T> head(args, first_head, packs, unit);
    Arena arena(scratch);
    const Meeting<E> meeting(&arena);
    const KeySums<E> key_sums(&arena, sizes);
    const int64_t size = head.padded_queries() * head.query_columns();
    auto* const query_sums = arena.take<sum_t<E>>(sizes.group_size() * size);
    clear(query_sums, sizes.group_size() * size);
    for (int64_t key = 0; key < sizes.num_keys; key += key_tile<E>) {
      head.clear_key_sums(key_sums);
      const Range queries = visible_queries(args.inputs.span, head.sequence, head.key_range(key));
      for (int64_t in_group = 0; in_group < sizes.group_size() && !queries.empty(); ++in_group) {
        for (int64_t query = queries.begin / query_tile * query_tile; query < queries.end; query += query_tile) {
          head.meet(meeting, in_group, query, key, query_sums + in_group * size + query * head.query_columns(),
                    &key_sums);
        }
      }
      head.store_key_grads(key, key_sums);
    }
    for (int64_t in_group = 0; in_group < sizes.group_size(); ++in_group) {
      for (int64_t query = 0; query < sizes.num_queries; query += query_tile) {
        head.store_query_grads(in_group, query, query_sums + in_group * size + query * head.query_columns());
      }
    }
  }
}

template <typename T>
void backward_queries(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin,
                      int64_t end) {
  using E = multiplicand_t<T>;
  const Sizes& sizes = args.inputs.sizes;
  const int64_t units = backward_query_units<T>(sizes);
  const int64_t tiles = divide_up(sizes.num_queries, query_tile);
  Arena arena(scratch);
  const Meeting<E> meeting(&arena);
  auto* const query_sums = arena.take<sum_t<E>>(query_tile * columns_of<E>(sizes.head_dim));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Head<T> head(args, first_head, packs, unit / units);
    const int64_t in_group = unit % units / tiles;
    const int64_t query = balanced_tile(unit % units % tiles, tiles) * query_tile;
    clear(query_sums, query_tile * head.query_columns());
    const Range keys = visible_keys(args.inputs.span, head.sequence, Range{query, query + head.num_rows(query)});
    for (int64_t key = keys.begin / key_tile<E> * key_tile<E>; !keys.empty() && key < keys.end; key += key_tile<E>) {
      head.meet(meeting, in_group, query, key, query_sums, nullptr);
    }
    head.store_query_grads(in_group, query, query_sums);
  }
}

template <typename T>
void backward_keys(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin,
                   int64_t end) {
  using E = multiplicand_t<T>;
  const Sizes& sizes = args.inputs.sizes;
  const int64_t units = backward_key_units<T>(sizes);
  Arena arena(scratch);
  const Meeting<E> meeting(&arena);
  const KeySums<E> key_sums(&arena, sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Head<T> head(args, first_head, packs, unit / units);
    const int64_t key = balanced_tile(unit % units, units) * key_tile<E>;
    head.clear_key_sums(key_sums);
    const Range queries = visible_queries(args.inputs.span, head.sequence, head.key_range(key));
    for (int64_t in_group = 0; in_group < sizes.group_size() && !queries.empty(); ++in_group) {
      for (int64_t query = queries.begin / query_tile * query_tile; query < queries.end; query += query_tile) {
        head.meet(meeting, in_group, query, key, nullptr, &key_sums);
      }
    }
    head.store_key_grads(key, key_sums);
  }
}

#define TORCHOPS_INSTANTIATE(T)                                                                         \
  template int64_t backward_pack_bytes<T>(const Sizes&);                                                \
  template int64_t backward_pack_units<T>(const Sizes&);                                                \
  template void backward_pack(const AttentionBackward<T>&, int64_t, void*, int64_t, int64_t);           \
  template int64_t backward_scratch_bytes<T>(const Sizes&, bool);                                       \
  template void backward_heads(const AttentionBackward<T>&, int64_t, void*, void*, int64_t, int64_t);   \
  template int64_t backward_query_units<T>(const Sizes&);                                               \
  template void backward_queries(const AttentionBackward<T>&, int64_t, void*, void*, int64_t, int64_t); \
  template int64_t backward_key_units<T>(const Sizes&);                                                 \
  template void backward_keys(const AttentionBackward<T>&, int64_t, void*, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
