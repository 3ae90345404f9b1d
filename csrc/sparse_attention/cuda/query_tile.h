#pragma once

#include <cstdint>

#include "core/attention/attention.h"

namespace torchops::kernels::sparse_attention {

using namespace attention;

// A range of the queries of some heads of each group, of every row of the batch: those whose lists are there at a time.
// Tiles one after the other go through the heads of a group and the queries of each, so that what a key adds up has
// the order of one tile with everything.
struct QueryTile {
  int64_t first_head;  // of each group
  int64_t num_heads;   // of each group
  int64_t first_query;
  int64_t num_queries;

  struct Place {
    int64_t batch;
    int64_t head;   // of all
    int64_t query;  // the first of a unit
  };
  // Units are queries, or as many of one head as `queries` says, in the order [B, heads of the tile, queries].
  constexpr int64_t units_of_head(int64_t queries = 1) const { return (num_queries + queries - 1) / queries; }
  constexpr int64_t units(const Sizes& sizes, int64_t queries = 1) const {
    return sizes.batch * sizes.num_kv_heads * num_heads * units_of_head(queries);
  }
  constexpr Place place(int64_t unit, int64_t num_kv_heads, int64_t group_size, int64_t queries = 1) const {
    const int64_t of_head = units_of_head(queries), head = unit / of_head;
    const int64_t kv_head = head / num_heads % num_kv_heads;
    return {head / num_heads / num_kv_heads, kv_head * group_size + first_head + head % num_heads,
            first_query + unit % of_head * queries};
  }
  constexpr int64_t end_of_queries() const { return first_query + num_queries; }
  constexpr bool is_first() const { return first_head == 0 && first_query == 0; }
  constexpr bool is_last(const Sizes& sizes) const {
    return first_head + num_heads == sizes.group_size() && end_of_queries() == sizes.num_queries;
  }
};

inline QueryTile all_queries(const Sizes& sizes) {
  return {0, sizes.group_size(), 0, sizes.num_queries};
}

// The first of as few tiles as take no more memory for their lists than `most_bytes`, or a query's.
inline QueryTile first_tile(const Sizes& sizes, int64_t num_listed, int64_t most_bytes) {
  const int64_t of_query = sizes.batch * sizes.num_kv_heads * num_listed * static_cast<int64_t>(sizeof(int32_t));
  if (of_query * sizes.group_size() * sizes.num_queries <= most_bytes) {
    return all_queries(sizes);
  }
  return {0, 1, 0, clamp(most_bytes / of_query, 1, sizes.num_queries)};
}

// The one behind a tile that is not the last.
inline QueryTile next_tile(const QueryTile& tile, const Sizes& sizes, int64_t most_queries) {
  const int64_t behind = tile.end_of_queries();
  if (behind == sizes.num_queries) {
    return {tile.first_head + tile.num_heads, tile.num_heads, 0, most_queries};
  }
  return {tile.first_head, tile.num_heads, behind, clamp(sizes.num_queries - behind, 0, most_queries)};
}

}  // namespace torchops::kernels::sparse_attention
