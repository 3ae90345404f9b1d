#include "span_attention/cpu/forward_kernel.h"

#include <type_traits>

#include "core/attention/cpu/packing.h"
#include "core/attention/cpu/tile_softmax.h"
#include "span_attention/cpu/tiles.h"

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {
namespace {

// The keys and values of one key-value head as right operands.
template <typename E>
struct Pack {
  E* keys;    // panels [Lk / panel][D][panel]
  E* values;  // [Lk][Dv]

  Pack(Arena* arena, int64_t num_keys, const Sizes& sizes) {
    keys = arena->take<E>(num_keys * depth_of<E>(sizes.head_dim));
    values = arena->take<E>(depth_of<E>(num_keys) * columns_of<E>(sizes.value_dim));
  }

  Pack from(int64_t key, const Sizes& sizes) const {
    Pack rest = *this;
    rest.keys += key * depth_of<E>(sizes.head_dim);
    rest.values += key / element<E>::depth * columns_of<E>(sizes.value_dim);
    return rest;
  }

  // Packs the keys [first, first + count), of which those of `seen` are read, as its first ones.
  template <typename T>
  void fill_keys(const Attention<T>& args, int64_t batch, int64_t head, Range seen, int64_t first,
                 int64_t count) const {
    pack_transposed(RowsInOrder<T>{args.key.row(batch, head, first), args.key.row_stride, seen.within(first, count)},
                    args.sizes.head_dim, count, keys);
  }
  template <typename T>
  void fill_values(const Attention<T>& args, int64_t batch, int64_t head, Range seen, int64_t first,
                   int64_t count) const {
    pack_right(RowsInOrder<T>{args.value.row(batch, head, first), args.value.row_stride, seen.within(first, count)},
               args.sizes.value_dim, count, values);
  }
};

// Few queries fit in one tile with those of the other heads of their group: then each key is read once.
constexpr int64_t heads_in_tile(const Sizes& sizes) {
  const int64_t fitting = sizes.num_queries == 0 ? 1 : query_tile / sizes.num_queries;
  return fitting < 1 ? 1 : fitting < sizes.group_size() ? fitting : sizes.group_size();
}
constexpr int64_t query_tiles(const Sizes& sizes) {
  return divide_up(sizes.num_queries, query_tile);
}
// A wave is worth packing when tiles share its keys; a lone tile packs those it is at.
constexpr bool packs_ahead(const Sizes& sizes) {
  return divide_up(sizes.group_size(), heads_in_tile(sizes)) * query_tiles(sizes) > 1;
}

// A tile of queries on its way through the keys.
template <typename E>
struct Scratch : TileSoftmax<E> {
  Pack<E> pack;  // of key_block keys

  Scratch(Arena* arena, const Sizes& sizes)
      : TileSoftmax<E>(arena, sizes), pack(arena, packs_ahead(sizes) ? 0 : key_block<E>, sizes) {}
};

// Queries [first_query, first_query + query_tile) of num_heads heads; `packed` is the head's of the wave, or null.
template <typename E, typename T>
void compute_tile(const AttentionForward<T>& args, const Pack<E>* packed, const Scratch<E>& scratch, int64_t batch,
                  int64_t first_head, int64_t num_heads, int64_t first_query) {
  using A = sum_t<E>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const Sequence sequence = inputs.sequence(batch);
  const int64_t queries_left = sizes.num_queries - first_query;
  const int64_t num_queries = queries_left < query_tile ? queries_left : query_tile;
  const int64_t num_rows = num_heads * num_queries;
  const int64_t padded_rows = round_up(num_rows, tile_rows);
  const int64_t columns = columns_of<E>(sizes.value_dim);

  for (int64_t head = 0; head < num_heads; ++head) {
    const bool last = head == num_heads - 1;
    const T* const queries = inputs.query.row(batch, first_head + head, first_query);
    pack_left(RowsInOrder<T>{queries, inputs.query.row_stride, Range{0, num_queries}}, sizes.head_dim,
              last ? padded_rows - head * num_queries : num_queries,
              scratch.queries + head * num_queries * left_stride<E>(sizes.head_dim));
  }
  scratch.clear(padded_rows, columns);

  // A single tile of registers reads the values once, and packing reads and writes them.
  const bool values_stay_in_place = padded_rows == tile_rows && columns == sizes.value_dim;
  const TileSpans spans(inputs.span, sequence, first_query, num_queries, num_heads);
  const Range keys = visible_keys(inputs.span, sequence, Range{first_query, first_query + num_queries});
  constexpr int64_t panel = panel_columns<A>;
  for (int64_t first = keys.begin / panel * panel; !keys.empty() && first < keys.end; first += key_block<E>) {
    const int64_t visible = keys.end - first < key_block<E> ? keys.end - first : key_block<E>;
    const int64_t num_keys = round_up(visible, panel);
    const Pack<E> pack = packed == nullptr ? scratch.pack : packed->from(first, sizes);
    const E* values = pack.values;
    int64_t value_stride = columns;
    if (packed == nullptr) {
      const int64_t kv_head = first_head / sizes.group_size();
      pack.fill_keys(inputs, batch, kv_head, keys, first, num_keys);
      if constexpr (std::is_same_v<T, E>) {
        if (values_stay_in_place) {
          values = inputs.value.row(batch, kv_head, first);
          value_stride = inputs.value.row_stride;
        }
      }
      if (values == pack.values) {
        pack.fill_values(inputs, batch, kv_head, keys, first, num_keys);
      }
    }
    if (inputs.key_bias != nullptr) {
      load_key_bias(inputs, batch, first, num_keys, scratch.bias);
    }
    scratch.compute_scores(sizes.head_dim, pack.keys, num_rows, num_keys, inputs.scale, inputs.key_bias != nullptr,
                           spans, first);
    scratch.compute_weights(padded_rows, num_keys);
    // Keys before the first visible one, and behind the last, have no weight.
    const int64_t skipped = keys.begin > first ? (keys.begin - first) / element<E>::depth : 0;
    scratch.add_values(padded_rows, columns, skipped, depth_of<E>(visible), values, value_stride);
  }

  for (int64_t row = 0; row < num_rows; ++row) {
    finish_row(args, batch, first_head + row / num_queries, first_query + row % num_queries, scratch.largest[row],
               sum_lanes<A>(scratch.sum[row]), scratch.output + row * columns);
  }
}

}  // namespace

template <typename T>
int64_t forward_pack_bytes(const Sizes& sizes) {
  using E = multiplicand_t<T>;
  Arena arena(nullptr);
  Pack<E>(&arena, packs_ahead(sizes) ? round_up(sizes.num_keys, key_tile<E>) : 0, sizes);
  return arena.bytes();
}

template <typename T>
int64_t forward_scratch_bytes(const Sizes& sizes) {
  Arena arena(nullptr);
  Scratch<multiplicand_t<T>>(&arena, sizes);
  return arena.bytes();
}

template <typename T>
int64_t forward_pack_units(const Sizes& sizes) {
  return packs_ahead(sizes) ? divide_up(sizes.num_keys, key_tile<multiplicand_t<T>>) : 0;
}

template <typename T>
int64_t forward_units(const Sizes& sizes) {
  return divide_up(sizes.group_size(), heads_in_tile(sizes)) * query_tiles(sizes);
}

namespace {

template <typename T>
auto pack_of(const Sizes& sizes, void* packs, int64_t in_wave) {
  using E = multiplicand_t<T>;
  Arena arena(static_cast<char*>(packs) + in_wave * forward_pack_bytes<T>(sizes));
  return Pack<E>(&arena, round_up(sizes.num_keys, key_tile<E>), sizes);
}

}  // namespace

template <typename T>
void forward_pack(const Attention<T>& args, int64_t first_head, void* packs, int64_t begin, int64_t end) {
  using E = multiplicand_t<T>;
  const Sizes& sizes = args.sizes;
  const int64_t tiles = forward_pack_units<T>(sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = (first_head + unit / tiles) / sizes.num_kv_heads;
    const int64_t head = (first_head + unit / tiles) % sizes.num_kv_heads;
    const int64_t key = unit % tiles * key_tile<E>;
    const Range seen = visible_keys(args.span, args.sequence(batch), Range{0, sizes.num_queries});
    if (!seen.within(key, key_tile<E>).empty()) {
      const Pack<E> pack = pack_of<T>(sizes, packs, unit / tiles).from(key, sizes);
      pack.fill_keys(args, batch, head, seen, key, key_tile<E>);
      pack.fill_values(args, batch, head, seen, key, key_tile<E>);
    }
  }
}

template <typename T>
void forward(const AttentionForward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin,
             int64_t end) {
  using E = multiplicand_t<T>;
  const Sizes& sizes = args.inputs.sizes;
  const int64_t tiles = query_tiles(sizes);
  const int64_t units = forward_units<T>(sizes);
  Arena arena(scratch);
  const Scratch<E> buffers(&arena, sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = (first_head + unit / units) / sizes.num_kv_heads;
    const int64_t kv_head = (first_head + unit / units) % sizes.num_kv_heads;
    const int64_t in_group = unit % units / tiles * heads_in_tile(sizes);
    const int64_t heads_left = sizes.group_size() - in_group;
    const Pack<E> packed = pack_of<T>(sizes, packs, unit / units);
    compute_tile(args, packs_ahead(sizes) ? &packed : nullptr, buffers, batch, kv_head * sizes.group_size() + in_group,
                 heads_left < heads_in_tile(sizes) ? heads_left : heads_in_tile(sizes),
                 balanced_tile(unit % tiles, tiles) * query_tile);
  }
}

#define TORCHOPS_INSTANTIATE(T)                                                      \
  template int64_t forward_pack_bytes<T>(const Sizes&);                              \
  template int64_t forward_scratch_bytes<T>(const Sizes&);                           \
  template int64_t forward_pack_units<T>(const Sizes&);                              \
  template void forward_pack(const Attention<T>&, int64_t, void*, int64_t, int64_t); \
  template int64_t forward_units<T>(const Sizes&);                                   \
  template void forward(const AttentionForward<T>&, int64_t, void*, void*, int64_t, int64_t);
TORCHOPS_INSTANTIATE(double)
TORCHOPS_INSTANTIATE(float)
TORCHOPS_INSTANTIATE(bfloat16)
TORCHOPS_INSTANTIATE(float16)
#undef TORCHOPS_INSTANTIATE

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
