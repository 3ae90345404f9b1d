#include "span_attention/cpu/forward_kernel.h"
#include "span_attention/cpu/tile_blocks.h"

// The forward of bfloat16 on tiles: 32 queries and 256 keys at a time.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {
namespace {

constexpr int64_t query_block = block_side;
constexpr int64_t key_block = 256;
// Keys of a unit of packing.
constexpr int64_t packed_keys = 64;

// The keys and values of one key-value head, in whole units.
struct Pack {
  bfloat16* keys;    // columns of a right operand
  bfloat16* values;  // the depth of a right operand

  Pack(Arena* arena, const Sizes& sizes) {
    const int64_t num_keys = round_up(sizes.num_keys, packed_keys);
    keys = arena->take<bfloat16>(num_keys * depth_tiles(sizes.head_dim) * tile_depth);
    values = arena->take<bfloat16>(num_keys * block_columns(sizes.value_dim));
  }

  bfloat16* keys_from(int64_t key, const Sizes& sizes) const {
    return keys + key / tile_side * depth_tiles(sizes.head_dim) * tile_numbers;
  }
  bfloat16* values_from(int64_t key, const Sizes& sizes) const {
    return values + key / tile_depth * (block_columns(sizes.value_dim) / tile_side) * tile_numbers;
  }
};

int64_t pack_bytes(const Sizes& sizes) {
  Arena arena(nullptr);
  Pack(&arena, sizes);
  return arena.bytes();
}
Pack pack_of(const Sizes& sizes, void* packs, int64_t in_wave) {
  Arena arena(static_cast<char*>(packs) + in_wave * pack_bytes(sizes));
  return {&arena, sizes};
}

// Few queries share a block with those of the other heads of their group.
constexpr int64_t heads_in_block(const Sizes& sizes) {
  const int64_t fitting = query_block / sizes.num_queries;
  return fitting < 1 ? 1 : smaller(fitting, sizes.group_size());
}
constexpr int64_t query_blocks(const Sizes& sizes) {
  return divide_up(sizes.num_queries, query_block);
}

// A block of queries on its way through the keys.
struct Block {
  bfloat16* queries;  // a left operand
  float* scores;      // [query_block][key_block], or products: what Distances are of
  bfloat16* weights;  // [query_block][key_block]: exp(score - largest)
  float* output;      // [query_block][block_columns(Dv)]
  vfloat* sum;        // [query_block]: the sum of weights, lane by lane
  float* largest;     // [query_block]
  float* highest;     // [query_block]: the largest of a block's scores
  float* bias;        // [key_block]

  Block(Arena* arena, const Sizes& sizes) {
    queries = arena->take<bfloat16>(query_block * depth_tiles(sizes.head_dim) * tile_depth);
    scores = arena->take<float>(query_block * key_block);
    weights = arena->take<bfloat16>(query_block * key_block);
    output = arena->take<float>(query_block * block_columns(sizes.value_dim));
    sum = arena->take<vfloat>(query_block);
    largest = arena->take<float>(query_block);
    highest = arena->take<float>(query_block);
    bias = arena->take<float>(key_block);
  }

  static int64_t bytes(const Sizes& sizes) {
    Arena arena(nullptr);
    Block(&arena, sizes);
    return arena.bytes();
  }

  void clear(const Sizes& sizes) const {
    for (int64_t row = 0; row < query_block; ++row) {
      largest[row] = -__builtin_inff();
      sum[row] = vfloat{};
    }
    __builtin_memset(output, 0, static_cast<size_t>(query_block * block_columns(sizes.value_dim)) * sizeof(float));
    __builtin_memset(bias, 0, static_cast<size_t>(key_block) * sizeof(float));
  }

  // The queries of several heads one behind the other.
  void pack_queries(const Attention<bfloat16>& args, int64_t batch, int64_t first_head, int64_t first_query,
                    int64_t num_queries, int64_t num_rows) const {
    const int64_t size = args.sizes.head_dim;
    for (int64_t row = 0; row < query_block; ++row) {
      const bfloat16* const from =
          row < num_rows ? args.query.row(batch, first_head + row / num_queries, first_query + row % num_queries)
                         : nullptr;
      bfloat16* const of_tile = queries + row / tile_side * depth_tiles(size) * tile_numbers;
      for (int64_t d = 0; d < size; d += tile_depth) {
        const vuint pairs = from == nullptr ? vuint{} : load_elements<bfloat16_pair>(from + d, size - d);
        __builtin_memcpy(of_tile + d / tile_depth * tile_numbers + row % tile_side * tile_depth, &pairs, sizeof(pairs));
      }
    }
  }

  void load_bias(const Attention<bfloat16>& args, int64_t batch, int64_t first, int64_t num_keys) const {
    if (args.key_bias != nullptr) {
      load_key_bias(args, batch, first, num_keys, bias);
    }
  }

  // Products of queries and keys.
  void multiply_keys(Tiles& tiles, const Sizes& sizes, const bfloat16* keys, int64_t num_keys) const {
    const int64_t step = depth_tiles(sizes.head_dim) * tile_numbers;
    for (int64_t key = 0; key < num_keys; key += block_side, keys += 2 * step) {
      zero_block(tiles);
      add_to_block(tiles, LeftTiles{queries, 2 * tile_depth, step, tile_numbers}, RightTiles{keys, step, tile_numbers},
                   depth_tiles(sizes.head_dim));
      store_block(tiles, scores + key, key_block);
    }
  }

  // Products of a row become scores.
  void add_bias(int64_t row, float scale, int64_t num_keys) const {
    float* const of_row = scores + row * key_block;
    for (int64_t key = 0; key < num_keys; key += tile_side) {
      store(of_row + key, score_of(load(of_row + key), scale, load(bias + key)));
    }
  }

  // Scores of keys that a row does not see become -inf.
  void hide(const TileSpans& spans, int64_t row, int64_t first_key, int64_t num_keys) const {
    const Range seen = spans.keys[row];
    const auto hide_some = [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; key += tile_side) {
        float* const at = scores + row * key_block + key;
        vfloat numbers[1] = {load(at)};
        spans.hide<float>(row, first_key + key, numbers, -__builtin_inff());
        store(at, numbers[0]);
      }
    };
    const int64_t begin = clamp(round_up(seen.begin - first_key, tile_side), 0, num_keys);
    hide_some(0, begin);
    hide_some(clamp(seen.end - first_key, begin, num_keys) / tile_side * tile_side, num_keys);
  }

  void find_highest(int64_t row, int64_t num_keys) const {
    const float* const of_row = scores + row * key_block;
    vfloat found[2];
    found[0] = found[1] = broadcast(-__builtin_inff());
    for (int64_t key = 0; key < num_keys; key += block_side) {
      found[0] = larger(load(of_row + key), found[0]);
      found[1] = larger(load(of_row + key + tile_side), found[1]);
    }
    highest[row] = largest_lane<float>(larger(found[0], found[1]));
  }

  // Scores of a row become weights; what was summed up before is rescaled where they rise.
  void weigh(const Distances& distances, int64_t row, int64_t num_keys, int64_t columns) const {
    const float before = largest[row];
    if (highest[row] > before) {
      const vfloat rescale = distances.weight(broadcast(before - highest[row]));
      sum[row] *= rescale;
      float* const of_row = output + row * columns;
      for (int64_t d = 0; d < columns; d += tile_side) {
        store(of_row + d, load(of_row + d) * rescale);
      }
      largest[row] = highest[row];
    }
    const float shift = reference_of(largest[row]);
    vfloat sums[2] = {sum[row], vfloat{}};
    const float* const of_row = scores + row * key_block;
    auto* const pairs = reinterpret_cast<bfloat16_pair*>(weights + row * key_block);
    for (int64_t key = 0; key < num_keys; key += block_side) {
      const vfloat first = distances.weight(load(of_row + key) - shift);
      const vfloat second = distances.weight(load(of_row + key + tile_side) - shift);
      sums[0] += first;
      sums[1] += second;
      store_pairs(pairs + key / 2, first, second);
    }
    sum[row] = sums[0] + sums[1];
  }

  void add_values(Tiles& tiles, const bfloat16* values, int64_t num_keys, int64_t columns) const {
    const int64_t row_of_tiles = columns / tile_side * tile_numbers;
    for (int64_t column = 0; column < columns; column += block_side) {
      load_block(tiles, output + column, columns);
      add_to_block(tiles, LeftTiles{weights, 2 * key_block, tile_side * key_block, tile_depth},
                   RightTiles{values + column / tile_side * tile_numbers, tile_numbers, row_of_tiles},
                   num_keys / tile_depth);
      store_block(tiles, output + column, columns);
    }
  }
};

void compute_block(Tiles& tiles, const AttentionForward<bfloat16>& args, const Pack& pack, const Block& block,
                   int64_t batch, int64_t first_head, int64_t num_heads, int64_t first_query) {
  const Attention<bfloat16>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const Sequence sequence = inputs.sequence(batch);
  const int64_t num_queries = smaller(sizes.num_queries - first_query, query_block);
  const int64_t num_rows = num_heads * num_queries;
  const int64_t columns = block_columns(sizes.value_dim);
  const TileSpans spans(inputs.span, sequence, first_query, num_queries, num_heads);
  const Distances distances(inputs);
  const Range keys = visible_keys(inputs.span, sequence, Range{first_query, first_query + num_queries});
  block.pack_queries(inputs, batch, first_head, first_query, num_queries, num_rows);
  block.clear(sizes);
  for (int64_t first = keys.begin / tile_depth * tile_depth; !keys.empty() && first < keys.end; first += key_block) {
    const int64_t num_keys = round_up(smaller(keys.end - first, key_block), tile_depth);
    block.load_bias(inputs, batch, first, num_keys);
    block.multiply_keys(tiles, sizes, pack.keys_from(first, sizes), num_keys);
    // The largest of all rows first: what a row waits for then has long been there.
    for (int64_t row = 0; row < num_rows; ++row) {
      if (!distances.of_products) {
        block.add_bias(row, inputs.scale, num_keys);
      }
      block.hide(spans, row, first, num_keys);
      block.find_highest(row, num_keys);
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      block.weigh(distances, row, num_keys, columns);
    }
    block.add_values(tiles, pack.values_from(first, sizes), num_keys, columns);
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    finish_row(args, batch, first_head + row / num_queries, first_query + row % num_queries, block.largest[row],
               sum_lanes<float>(block.sum[row]), block.output + row * columns, distances.scale);
  }
}

int64_t num_pack_units(const Sizes& sizes) {
  return divide_up(sizes.num_keys, packed_keys);
}
int64_t num_units(const Sizes& sizes) {
  return divide_up(sizes.group_size(), heads_in_block(sizes)) * query_blocks(sizes);
}

void pack_on_tiles(const Attention<bfloat16>& args, int64_t first_head, void* packs, int64_t begin, int64_t end) {
  const Sizes& sizes = args.sizes;
  const int64_t units = num_pack_units(sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = (first_head + unit / units) / sizes.num_kv_heads;
    const int64_t head = (first_head + unit / units) % sizes.num_kv_heads;
    const int64_t key = unit % units * packed_keys;
    const Range seen = visible_keys(args.span, args.sequence(batch), Range{0, sizes.num_queries});
    const ReadableRows used = readable(seen.within(key, packed_keys));
    const Pack pack = pack_of(sizes, packs, unit / units);
    pack_rows_along<true>(args.key.row(batch, head, key), args.key.row_stride, used, sizes.head_dim, packed_keys,
                          pack.keys_from(key, sizes));
    pack_rows_across<true>(args.value.row(batch, head, key), args.value.row_stride, used, sizes.value_dim, packed_keys,
                           pack.values_from(key, sizes));
  }
}

void forward_on_tiles(const AttentionForward<bfloat16>& args, int64_t first_head, void* packs, void* scratch,
                      int64_t begin, int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t blocks = query_blocks(sizes), units = num_units(sizes);
  Arena arena(scratch);
  const Block block(&arena, sizes);
  Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = (first_head + unit / units) / sizes.num_kv_heads;
    const int64_t kv_head = (first_head + unit / units) % sizes.num_kv_heads;
    const int64_t in_group = unit % units / blocks * heads_in_block(sizes);
    compute_block(tiles, args, pack_of(sizes, packs, unit / units), block, batch,
                  kv_head * sizes.group_size() + in_group,
                  smaller(sizes.group_size() - in_group, heads_in_block(sizes)),
                  balanced_tile(unit % blocks, blocks) * query_block);
  }
}

}  // namespace

template <typename T>
int64_t forward_pack_bytes(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? pack_bytes(sizes) : avx512_bf16::forward_pack_bytes<T>(sizes);
}

template <typename T>
int64_t forward_scratch_bytes(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? Block::bytes(sizes) : avx512_bf16::forward_scratch_bytes<T>(sizes);
}

template <typename T>
int64_t forward_pack_units(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? num_pack_units(sizes) : avx512_bf16::forward_pack_units<T>(sizes);
}

template <typename T>
int64_t forward_units(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? num_units(sizes) : avx512_bf16::forward_units<T>(sizes);
}

template <typename T>
void forward_pack(const Attention<T>& args, int64_t first_head, void* packs, int64_t begin, int64_t end) {
  if constexpr (is_pair<multiplicand_t<T>>) {
    if (uses_tiles<T>(args.sizes)) {
      return pack_on_tiles(args, first_head, packs, begin, end);
    }
  }
  avx512_bf16::forward_pack(args, first_head, packs, begin, end);
}

template <typename T>
void forward(const AttentionForward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin,
             int64_t end) {
  if constexpr (is_pair<multiplicand_t<T>>) {
    if (uses_tiles<T>(args.inputs.sizes)) {
      return forward_on_tiles(args, first_head, packs, scratch, begin, end);
    }
  }
  avx512_bf16::forward(args, first_head, packs, scratch, begin, end);
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
