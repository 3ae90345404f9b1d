#include "span_attention/cpu/backward_blocks.h"
#include "span_attention/cpu/backward_kernel.h"

// The backward of bfloat16 on tiles; what tiles do not serve goes to the level below.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {
namespace {

constexpr int64_t query_block = backward_queries_of_block;
constexpr int64_t key_block = backward_keys_of_block;

int64_t query_blocks(const Sizes& sizes) {
  return divide_up(sizes.num_queries, query_block);
}
int64_t query_units(const Sizes& sizes) {
  return sizes.group_size() * query_blocks(sizes);
}
int64_t key_units(const Sizes& sizes) {
  return divide_up(sizes.num_keys, key_block);
}

struct Scratch {
  Meeting meeting;
  KeySums key_sums;
  float* turned;      // [16][block_columns(D)]
  float* query_sums;  // [blocks of queries][block_columns(D)][queries]

  Scratch(Arena* arena, const Sizes& sizes, bool whole_heads) : meeting(arena), key_sums(arena, sizes) {
    const int64_t columns = block_columns(sizes.head_dim);
    turned = arena->take<float>(tile_side * columns);
    query_sums = arena->take<float>((whole_heads ? query_units(sizes) : 1) * query_block * columns);
  }
};

int64_t scratch_bytes(const Sizes& sizes, bool whole_heads) {
  Arena arena(nullptr);
  Scratch(&arena, sizes, whole_heads);
  return arena.bytes();
}

void pack_on_tiles(const AttentionBackward<bfloat16>& args, int64_t first_head, void* packs, int64_t begin,
                   int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t units = key_units(sizes) + query_units(sizes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const BackwardHead head(args, first_head, packs, unit / units);
    const int64_t in_head = unit % units, of_queries = in_head - key_units(sizes);
    if (of_queries < 0) {
      head.pack_keys(in_head * key_block);
    } else {
      head.pack_queries(of_queries / query_blocks(sizes), of_queries % query_blocks(sizes) * query_block);
    }
  }
}

// All blocks of queries that meet one of keys, in the order in which every pass adds up.
template <typename SumsOf>
void meet_queries(Tiles& tiles, const BackwardHead& head, const Scratch& scratch, int64_t key, const SumsOf& sums_of) {
  head.clear_key_sums(scratch.key_sums);
  const Range queries = visible_queries(head.args.inputs.span, head.sequence, head.key_range(key));
  for (int64_t in_group = 0; in_group < head.sizes().group_size() && !queries.empty(); ++in_group) {
    for (int64_t query = queries.begin / query_block * query_block; query < queries.end; query += query_block) {
      head.meet(tiles, scratch.meeting, in_group, query, key, sums_of(in_group, query), &scratch.key_sums);
    }
  }
  head.store_key_grads(key, scratch.key_sums);
}

void heads_on_tiles(const AttentionBackward<bfloat16>& args, int64_t first_head, void* packs, void* memory,
                    int64_t begin, int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  Arena arena(memory);
  const Scratch scratch(&arena, sizes, true);
  Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const BackwardHead head(args, first_head, packs, unit);
    const int64_t size = query_block * head.query_columns();
    const auto sums_of = [&](int64_t in_group, int64_t query) {
      return scratch.query_sums + (in_group * query_blocks(sizes) + query / query_block) * size;
    };
    BackwardHead::clear(scratch.query_sums, query_units(sizes) * size);
    for (int64_t key = 0; key < sizes.num_keys; key += key_block) {
      meet_queries(tiles, head, scratch, key, sums_of);
    }
    for (int64_t in_group = 0; in_group < sizes.group_size(); ++in_group) {
      for (int64_t query = 0; query < sizes.num_queries; query += query_block) {
        head.store_query_grads(in_group, query, sums_of(in_group, query), scratch.turned);
      }
    }
  }
}

void queries_on_tiles(const AttentionBackward<bfloat16>& args, int64_t first_head, void* packs, void* memory,
                      int64_t begin, int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t units = query_units(sizes), blocks = query_blocks(sizes);
  Arena arena(memory);
  const Scratch scratch(&arena, sizes, false);
  Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const BackwardHead head(args, first_head, packs, unit / units);
    const int64_t in_group = unit % units / blocks;
    const int64_t query = balanced_tile(unit % units % blocks, blocks) * query_block;
    BackwardHead::clear(scratch.query_sums, query_block * head.query_columns());
    const Range keys = visible_keys(args.inputs.span, head.sequence, Range{query, query + head.num_rows(query)});
    for (int64_t key = keys.begin / key_block * key_block; !keys.empty() && key < keys.end; key += key_block) {
      head.meet(tiles, scratch.meeting, in_group, query, key, scratch.query_sums, nullptr);
    }
    head.store_query_grads(in_group, query, scratch.query_sums, scratch.turned);
  }
}

void keys_on_tiles(const AttentionBackward<bfloat16>& args, int64_t first_head, void* packs, void* memory,
                   int64_t begin, int64_t end) {
  const Sizes& sizes = args.inputs.sizes;
  const int64_t units = key_units(sizes);
  Arena arena(memory);
  const Scratch scratch(&arena, sizes, false);
  Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const BackwardHead head(args, first_head, packs, unit / units);
    meet_queries(tiles, head, scratch, balanced_tile(unit % units, units) * key_block,
                 [](int64_t, int64_t) { return static_cast<float*>(nullptr); });
  }
}

}  // namespace

template <typename T>
int64_t backward_pack_bytes(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? BackwardHead::pack_bytes(sizes) : avx512_bf16::backward_pack_bytes<T>(sizes);
}

template <typename T>
int64_t backward_query_units(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? query_units(sizes) : avx512_bf16::backward_query_units<T>(sizes);
}

template <typename T>
int64_t backward_key_units(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? key_units(sizes) : avx512_bf16::backward_key_units<T>(sizes);
}

template <typename T>
int64_t backward_pack_units(const Sizes& sizes) {
  return uses_tiles<T>(sizes) ? key_units(sizes) + query_units(sizes) : avx512_bf16::backward_pack_units<T>(sizes);
}

template <typename T>
int64_t backward_scratch_bytes(const Sizes& sizes, bool whole_heads) {
  return uses_tiles<T>(sizes) ? scratch_bytes(sizes, whole_heads)
                              : avx512_bf16::backward_scratch_bytes<T>(sizes, whole_heads);
}

template <typename T>
void backward_pack(const AttentionBackward<T>& args, int64_t first_head, void* packs, int64_t begin, int64_t end) {
  if constexpr (is_pair<multiplicand_t<T>>) {
    if (uses_tiles<T>(args.inputs.sizes)) {
      return pack_on_tiles(args, first_head, packs, begin, end);
    }
  }
  avx512_bf16::backward_pack(args, first_head, packs, begin, end);
}

#define TORCHOPS_PASS(name)                                                                              \
  template <typename T>                                                                                  \
  void backward_##name(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch, \
                       int64_t begin, int64_t end) {                                                     \
    if constexpr (is_pair<multiplicand_t<T>>) {                                                          \
      if (uses_tiles<T>(args.inputs.sizes)) {                                                            \
        return name##_on_tiles(args, first_head, packs, scratch, begin, end);                            \
      }                                                                                                  \
    }                                                                                                    \
    avx512_bf16::backward_##name(args, first_head, packs, scratch, begin, end);                          \
  }
TORCHOPS_PASS(heads)
TORCHOPS_PASS(queries)
TORCHOPS_PASS(keys)
#undef TORCHOPS_PASS

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
