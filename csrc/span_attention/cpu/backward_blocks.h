#pragma once

#include "span_attention/cpu/tile_blocks.h"

// The backward of one key-value head on tiles: where blocks of queries and keys meet.
//
// Scores are computed with keys as rows and queries as columns. Probabilities are then a left operand as they come, for
// the gradients to values, and so are the gradients to scores for those to keys; for those to queries they are a right
// operand once neighbouring rows are interleaved. Nothing is transposed but the sums for queries, when they are stored.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

inline constexpr int64_t backward_queries_of_block = 64;
inline constexpr int64_t backward_keys_of_block = 128;
// Keys whose scores are computed at a time.
inline constexpr int64_t backward_strip = block_side;

// One key-value head and its query heads, packed.
struct BackwardPack {
  bfloat16* keys;           // rows of a left operand
  bfloat16* values;         // rows of a left operand
  bfloat16* keys_turned;    // the depth of a left operand
  bfloat16* queries;        // [group]: columns of a right operand
  bfloat16* grads;          // [group]: columns of a right operand, grad_output
  bfloat16* queries_depth;  // [group]: the depth of a right operand
  bfloat16* grads_depth;    // [group]: the depth of a right operand

  BackwardPack(Arena* arena, const Sizes& sizes) {
    const int64_t num_keys = round_up(sizes.num_keys, backward_keys_of_block);
    const int64_t num_queries = sizes.group_size() * padded_queries(sizes);
    keys = arena->take<bfloat16>(num_keys * along(sizes.head_dim));
    values = arena->take<bfloat16>(num_keys * along(sizes.value_dim));
    keys_turned = arena->take<bfloat16>(num_keys * block_columns(sizes.head_dim));
    queries = arena->take<bfloat16>(num_queries * along(sizes.head_dim));
    grads = arena->take<bfloat16>(num_queries * along(sizes.value_dim));
    queries_depth = arena->take<bfloat16>(num_queries * block_columns(sizes.head_dim));
    grads_depth = arena->take<bfloat16>(num_queries * block_columns(sizes.value_dim));
  }

  // Numbers that a packed row takes, the depth along it; where it is the depth, they are block_columns(size).
  static constexpr int64_t along(int64_t size) { return depth_tiles(size) * tile_depth; }
  // Rows of a head's packed queries.
  static constexpr int64_t padded_queries(const Sizes& sizes) {
    return round_up(sizes.num_queries, backward_queries_of_block);
  }
};

// Sums for a block of keys.
struct KeySums {
  float* keys;    // [keys][block_columns(D)], without the scale
  float* values;  // [keys][block_columns(Dv)]
  float* bias;    // [keys]

  KeySums(Arena* arena, const Sizes& sizes) {
    keys = arena->take<float>(backward_keys_of_block * block_columns(sizes.head_dim));
    values = arena->take<float>(backward_keys_of_block * block_columns(sizes.value_dim));
    bias = arena->take<float>(backward_keys_of_block);
  }
};

// What a meeting computes.
struct Meeting {
  float* scores;                 // [strip][queries], or products: what Distances are of
  float* value_grads;            // [strip][queries]: products of values and grad_output
  bfloat16* probabilities;       // left operand [keys][queries]
  bfloat16* score_grads;         // left operand [keys][queries]
  bfloat16* score_grads_paired;  // right operand whose depth is the keys: [keys / 32][queries / 16] tiles
  float* largest;                // [queries], of the normalizer
  float* inverse_sum;            // [queries]
  float* delta;                  // [queries]
  float* bias;                   // [keys]

  explicit Meeting(Arena* arena) {
    constexpr int64_t queries = backward_queries_of_block, keys = backward_keys_of_block;
    scores = arena->take<float>(backward_strip * queries);
    value_grads = arena->take<float>(backward_strip * queries);
    probabilities = arena->take<bfloat16>(keys * queries);
    score_grads = arena->take<bfloat16>(keys * queries);
    score_grads_paired = arena->take<bfloat16>(keys * queries);
    largest = arena->take<float>(queries);
    inverse_sum = arena->take<float>(queries);
    delta = arena->take<float>(queries);
    bias = arena->take<float>(keys);
  }
};

struct BackwardHead {
  static constexpr int64_t query_block = backward_queries_of_block;
  static constexpr int64_t key_block = backward_keys_of_block;

  const AttentionBackward<bfloat16>& args;
  int64_t batch;
  int64_t kv_head;
  BackwardPack pack;
  Sequence sequence;
  Distances distances;

  BackwardHead(const AttentionBackward<bfloat16>& backward, int64_t first_head, void* packs, int64_t in_wave)
      : args(backward),
        batch((first_head + in_wave) / sizes().num_kv_heads),
        kv_head((first_head + in_wave) % sizes().num_kv_heads),
        pack(pack_of(packs, in_wave, sizes())),
        sequence(backward.inputs.sequence(batch)),
        distances(backward.inputs) {}

  static int64_t pack_bytes(const Sizes& sizes) {
    Arena arena(nullptr);
    BackwardPack(&arena, sizes);
    return arena.bytes();
  }
  static BackwardPack pack_of(void* packs, int64_t in_wave, const Sizes& sizes) {
    Arena arena(static_cast<char*>(packs) + in_wave * pack_bytes(sizes));
    return {&arena, sizes};
  }

  const Sizes& sizes() const { return args.inputs.sizes; }
  int64_t head(int64_t in_group) const { return kv_head * sizes().group_size() + in_group; }
  int64_t padded_queries() const { return BackwardPack::padded_queries(sizes()); }
  int64_t query_columns() const { return block_columns(sizes().head_dim); }
  int64_t value_columns() const { return block_columns(sizes().value_dim); }
  int64_t num_rows(int64_t first_query) const { return smaller(sizes().num_queries - first_query, query_block); }
  Range key_range(int64_t first_key) const { return {first_key, smaller(first_key + key_block, sizes().num_keys)}; }
  bool wants_scores_by_key() const { return args.grad_key.data != nullptr || args.grad_key_bias != nullptr; }

  void pack_keys(int64_t first_key) const {
    const Attention<bfloat16>& inputs = args.inputs;
    const int64_t size = sizes().head_dim;
    const Range seen = visible_keys(inputs.span, sequence, Range{0, sizes().num_queries});
    const ReadableRows used = readable(seen.within(first_key, key_block));
    const bfloat16* const rows = inputs.key.row(batch, kv_head, first_key);
    pack_rows_along<false>(rows, inputs.key.row_stride, used, size, key_block,
                           pack.keys + first_key * BackwardPack::along(size));
    pack_rows_across<false>(rows, inputs.key.row_stride, used, size, key_block,
                            pack.keys_turned + first_key * query_columns());
    if (inputs.value.data != nullptr) {
      pack_rows_along<false>(inputs.value.row(batch, kv_head, first_key), inputs.value.row_stride, used,
                             sizes().value_dim, key_block,
                             pack.values + first_key * BackwardPack::along(sizes().value_dim));
    }
  }

  void pack_queries(int64_t in_group, int64_t first_query) const {
    const Range seeing = visible_queries(args.inputs.span, sequence, Range{0, sizes().num_keys});
    const ReadableRows used = readable(seeing.within(first_query, query_block));
    const int64_t packed_row = in_group * padded_queries() + first_query;
    const auto pack_rows = [&](const Heads<const bfloat16>& tensor, int64_t size, bfloat16* along, bfloat16* across) {
      const bfloat16* const rows = tensor.row(batch, head(in_group), first_query);
      pack_rows_along<true>(rows, tensor.row_stride, used, size, query_block,
                            along + packed_row * BackwardPack::along(size));
      pack_rows_across<true>(rows, tensor.row_stride, used, size, query_block,
                             across + packed_row * block_columns(size));
    };
    pack_rows(args.inputs.query, sizes().head_dim, pack.queries, pack.queries_depth);
    if (sizes().value_dim > 0) {
      pack_rows(args.grad_output, sizes().value_dim, pack.grads, pack.grads_depth);
    }
  }

  // Probabilities and the gradients to scores, and their sums for the queries, [block_columns(D)][queries], and for
  // the keys of the blocks where those are given.
  void meet(Tiles& tiles, const Meeting& meeting, int64_t in_group, int64_t first_query, int64_t first_key,
            float* query_sums, const KeySums* key_sums) const {
    const int64_t packed_row = in_group * padded_queries() + first_query;
    const Range rows{first_query, first_query + num_rows(first_query)};
    const Range seen = visible_keys(args.inputs.span, sequence, rows).within(first_key, key_block);
    const bool by_key = key_sums != nullptr && wants_scores_by_key();
    const bool with_scores = by_key || query_sums != nullptr;
    // Strips of keys that some query sees.
    const int64_t begin = seen.begin / backward_strip * backward_strip, end = round_up(seen.end, backward_strip);
    if (begin >= end) {
      return;
    }
    const bool all_visible = visible_keys(args.inputs.span, sequence, rows.end - 1).begin <= first_key + begin &&
                             first_key + end <= visible_keys(args.inputs.span, sequence, first_query).end;
    load_queries(meeting, in_group, first_query);
    load_key_bias(args.inputs, batch, first_key, key_block, meeting.bias);
    for (int64_t key = begin; key < end; key += backward_strip) {
      multiply_rows(tiles, pack.keys, pack.queries, sizes().head_dim, first_key + key, packed_row, meeting.scores);
      if (!distances.of_products) {
        add_bias(meeting, key);
      }
      if (with_scores) {
        multiply_rows(tiles, pack.values, pack.grads, sizes().value_dim, first_key + key, packed_row,
                      meeting.value_grads);
      }
      finish_strip(meeting, first_query, first_key, key, all_visible, with_scores,
                   by_key && args.grad_key_bias != nullptr ? key_sums->bias : nullptr);
    }
    if (key_sums != nullptr && args.grad_value.data != nullptr) {
      add_to_keys(tiles, meeting.probabilities, pack.grads_depth, packed_row, value_columns(), begin, end,
                  key_sums->values);
    }
    if (by_key && args.grad_key.data != nullptr) {
      add_to_keys(tiles, meeting.score_grads, pack.queries_depth, packed_row, query_columns(), begin, end,
                  key_sums->keys);
    }
    if (query_sums != nullptr) {
      add_to_queries(tiles, meeting.score_grads_paired, first_key, begin, end, query_sums);
    }
  }

  // `turned` takes 16 rows of sums.
  void store_query_grads(int64_t in_group, int64_t first_query, const float* sums, float* turned) const {
    const int64_t columns = query_columns();
    for (int64_t first = 0; first < num_rows(first_query); first += tile_side) {
      for (int64_t d = 0; d < columns; d += tile_side) {
        turn<float>([&](int lane) { return load(sums + (d + lane) * query_block + first); },
                    [&](int lane, vfloat numbers) { store(turned + lane * columns + d, numbers); });
      }
      for (int64_t row = 0; row < tile_side && first + row < num_rows(first_query); ++row) {
        store_gradient(args.grad_query.row(batch, head(in_group), first_query + first + row), turned + row * columns,
                       sizes().head_dim, args.inputs.scale);
      }
    }
  }

  void store_key_grads(int64_t first_key, const KeySums& sums) const {
    store_key_gradients(args, batch, kv_head, key_range(first_key), sums, query_columns(), value_columns());
  }

  void clear_key_sums(const KeySums& sums) const {
    clear(sums.keys, key_block * query_columns());
    clear(sums.values, key_block * value_columns());
    clear(sums.bias, key_block);
  }

  static void clear(float* numbers, int64_t count) {
    __builtin_memset(numbers, 0, static_cast<size_t>(count) * sizeof(float));
  }

 private:
  void load_queries(const Meeting& meeting, int64_t in_group, int64_t first_query) const {
    load_normalizers(args, batch, head(in_group), Range{first_query, first_query + num_rows(first_query)}, query_block,
                     meeting.largest, meeting.inverse_sum, meeting.delta);
  }

  // A strip of rows times the rows of a block of queries.
  static void multiply_rows(Tiles& tiles, const bfloat16* left, const bfloat16* right, int64_t size, int64_t left_row,
                            int64_t right_row, float* products) {
    const int64_t step = depth_tiles(size) * tile_numbers;
    const LeftTiles rows{left + left_row / tile_side * step, 2 * tile_depth, step, tile_numbers};
    for (int64_t query = 0; query < query_block; query += block_side) {
      zero_block(tiles);
      add_to_block(tiles, rows, RightTiles{right + (right_row + query) / tile_side * step, step, tile_numbers},
                   depth_tiles(size));
      store_block(tiles, products + query, query_block);
    }
  }

  // Products become probabilities and gradients to scores, two keys at a time. Their sums go to bias_sums, or nowhere
  // where that is null.
  void finish_strip(const Meeting& meeting, int64_t first_query, int64_t first_key, int64_t strip, bool all_visible,
                    bool with_scores, float* bias_sums) const {
    constexpr int64_t vectors = query_block / tile_side;
    for (int64_t key = strip; key < strip + backward_strip; key += 2) {
      vfloat grads[2][vectors];
      for (int64_t k = 0; k < 2; ++k) {
        const int64_t in_strip = (key + k - strip) * query_block;
        vfloat probabilities[vectors];
        for (int64_t v = 0; v < vectors; ++v) {
          probabilities[v] = probability(meeting, load(meeting.scores + in_strip + v * tile_side), v);
        }
        if (!all_visible) {
          hide(first_query, first_key + key + k, probabilities);
        }
        store_row_of_pairs(meeting.probabilities, key + k, probabilities);
        if (with_scores) {
          vfloat sum = {};
          for (int64_t v = 0; v < vectors; ++v) {
            const vfloat value_grad = load(meeting.value_grads + in_strip + v * tile_side);
            const vfloat grad = probabilities[v] * (value_grad - load(meeting.delta + v * tile_side));
            grads[k][v] = probabilities[v] == 0.0f ? vfloat{} : grad;
            sum += grads[k][v];
          }
          store_row_of_pairs(meeting.score_grads, key + k, grads[k]);
          if (bias_sums != nullptr) {
            bias_sums[key + k] += sum_lanes<float>(sum);
          }
        }
      }
      for (int64_t v = 0; with_scores && v < vectors; ++v) {
        bfloat16* const tile = meeting.score_grads_paired + (key / tile_depth * vectors + v) * tile_numbers;
        auto* const to = reinterpret_cast<bfloat16_pair*>(tile) + key % tile_depth / 2 * tile_side;
        store_interleaved(to, grads[0][v], grads[1][v]);
      }
    }
  }

  // Products of a strip of keys become scores.
  void add_bias(const Meeting& meeting, int64_t strip) const {
    float* at = meeting.scores;
    for (int64_t key = strip; key < strip + backward_strip; ++key) {
      for (int64_t query = 0; query < query_block; query += tile_side, at += tile_side) {
        store(at, score_of(load(at), args.inputs.scale, broadcast(meeting.bias[key])));
      }
    }
  }

  vfloat probability(const Meeting& meeting, vfloat score, int64_t vector) const {
    const vfloat distance = score - load(meeting.largest + vector * tile_side);
    return distances.weight(smaller(vfloat{}, distance)) * load(meeting.inverse_sum + vector * tile_side);
  }

  // Leaves the numbers of the queries that see a key. One behind the last is zeros, which add nothing.
  template <int64_t vectors>
  void hide(int64_t first_query, int64_t key, vfloat (&numbers)[vectors]) const {
    const Range seeing = visible_queries(args.inputs.span, sequence, key).within(first_query, query_block);
    for (int64_t v = 0; v < vectors; ++v) {
      const vint query = lane_numbers<int32_t>() + static_cast<int32_t>(v * tile_side);
      numbers[v] = (query >= static_cast<int32_t>(seeing.begin)) & (query < static_cast<int32_t>(seeing.end))
                       ? numbers[v]
                       : vfloat{};
    }
  }

  template <int64_t vectors>
  static void store_row_of_pairs(bfloat16* matrix, int64_t row, const vfloat (&numbers)[vectors]) {
    auto* const to = reinterpret_cast<bfloat16_pair*>(matrix + row * query_block);
    for (int64_t v = 0; v < vectors; v += 2) {
      store_pairs(to + v * tile_side / 2, numbers[v], numbers[v + 1]);
    }
  }

  static void add_to_keys(Tiles& tiles, const bfloat16* by_key, const bfloat16* depth, int64_t packed_row,
                          int64_t columns, int64_t begin, int64_t end, float* sums) {
    const int64_t step = columns / tile_side * tile_numbers;
    const bfloat16* const of_queries = depth + packed_row / tile_depth * step;
    for (int64_t key = begin; key < end; key += block_side) {
      const LeftTiles left{by_key + key * query_block, 2 * query_block, tile_side * query_block, tile_depth};
      for (int64_t column = 0; column < columns; column += block_side) {
        float* const to = sums + key * columns + column;
        load_block(tiles, to, columns);
        add_to_block(tiles, left, RightTiles{of_queries + column / tile_side * tile_numbers, tile_numbers, step},
                     query_block / tile_depth);
        store_block(tiles, to, columns);
      }
    }
  }

  void add_to_queries(Tiles& tiles, const bfloat16* paired, int64_t first_key, int64_t begin, int64_t end,
                      float* sums) const {
    const int64_t row_of_tiles = query_columns() / tile_side * tile_numbers;
    const bfloat16* const of_keys = pack.keys_turned + (first_key + begin) / tile_depth * row_of_tiles;
    constexpr int64_t depth_step = query_block / tile_side * tile_numbers;
    for (int64_t d = 0; d < query_columns(); d += block_side) {
      const LeftTiles left{of_keys + d / tile_side * tile_numbers, 2 * tile_depth, tile_numbers, row_of_tiles};
      for (int64_t query = 0; query < query_block; query += block_side) {
        const bfloat16* const from = paired + begin / tile_depth * depth_step + query / tile_side * tile_numbers;
        float* const to = sums + d * query_block + query;
        load_block(tiles, to, query_block);
        add_to_block(tiles, left, RightTiles{from, tile_numbers, depth_step}, (end - begin) / tile_depth);
        store_block(tiles, to, query_block);
      }
    }
  }
};

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
