#pragma once

#include "core/attention/cpu/packing.h"
#include "sparse_attention/cpu/tile_rows.h"

// Queries that go by one list, as rows of a tile: their products with the keys of the list are products of matrices.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// Rows of keys or values that a run names; zeros behind the last.
template <typename T>
struct ListedRows {
  const T* data;
  int64_t stride;
  const Run& run;

  ListedRows(const Heads<const T>& tensor, int64_t batch, int64_t kv_head, const Run& run)
      : data(tensor.row(batch, kv_head, 0)), stride(tensor.row_stride), run(run) {}

  const T* operator()(int64_t row) const { return row < run.count ? data + run.keys[row] * stride : nullptr; }
};

// The biases of a run and zeros behind it, `count` in all; whether there are any.
template <typename T, typename A>
bool load_biases(const Attention<T>& inputs, int64_t batch, int64_t head, int64_t list, const Run& run, int64_t count,
                 A* biases) {
  const A* const of_keys = inputs.key_biases_of(batch);
  const A* const of_entries = inputs.biases_of(batch, head, list);
  for (int64_t e = 0; e < count; ++e) {
    biases[e] = e < run.count ? (of_keys == nullptr ? A(0) : of_keys[run.keys[e]]) +
                                    (of_entries == nullptr ? A(0) : of_entries[run.places[e]])
                              : A(0);
  }
  return of_keys != nullptr || of_entries != nullptr;
}

// A list's queries of some of the heads that share it, head by head.
struct ListTile {
  int64_t batch;
  int64_t first_head;
  int64_t num_heads;
  int64_t first_query;
  int64_t num_queries;

  int64_t num_rows() const { return num_heads * num_queries; }
  int64_t head_of(int64_t row) const { return first_head + row / num_queries; }
  int64_t query_of(int64_t row) const { return first_query + row % num_queries; }
  int64_t last_query() const { return first_query + num_queries - 1; }

  // The first query that sees a key of a list that begins with this one. Which part of the list a range of keys leaves
  // does not count: what is no number in a query reaches the same keys, however many threads there are.
  int64_t first_seeing(const ListRule& rule, const Sequence& sequence, int64_t first_key) const {
    int64_t query = first_query;
    while (query <= last_query() && first_key >= end_of_keys(rule, sequence, query)) {
      ++query;
    }
    return query;
  }

  // What each row sees of a run.
  TileRanges ranges_of(const ListRule& rule, const Sequence& sequence, const Run& run) const {
    TileRanges ranges;
    int64_t seen = 0;
    for (int64_t row = 0; row < num_queries; ++row) {
      const int64_t end = end_of_keys(rule, sequence, query_of(row));
      while (seen < run.count && run.keys[seen] < end) {
        ++seen;
      }
      ranges.keys[row] = {0, seen};
    }
    for (int64_t row = num_queries; row < num_rows(); ++row) {
      ranges.keys[row] = ranges.keys[row - num_queries];
    }
    return ranges;
  }

  // A list's rows of a tensor [B, Hq, Lq, ...]. Zeros stand for queries that see nothing, which may hold anything.
  template <typename T>
  struct Rows {
    const ListTile& tile;
    const Heads<const T>& tensor;
    int64_t first_seeing;  // query

    const T* operator()(int64_t row) const {
      return row < tile.num_rows() && tile.query_of(row) >= first_seeing
                 ? tensor.row(tile.batch, tile.head_of(row), tile.query_of(row))
                 : nullptr;
    }
  };
};

// Calls body(tile) for the tiles of a list's queries and of heads_of_list() heads from first_head on.
template <typename T, typename Body>
void for_tiles(const Attention<T>& inputs, int64_t batch, int64_t first_head, int64_t list, const Body& body) {
  const int64_t first = list * inputs.rule.query_block, left = inputs.sizes.num_queries - first;
  const int64_t num_queries = left < inputs.rule.query_block ? left : inputs.rule.query_block;
  const int64_t heads = inputs.heads_of_list();
  const int64_t fitting = num_queries < query_tile ? query_tile / num_queries : 1;
  for (int64_t head = 0; head < heads; head += fitting) {
    for (int64_t query = 0; query < num_queries; query += query_tile) {
      body(ListTile{batch, first_head + head, smaller(heads - head, fitting), first + query,
                    smaller(num_queries - query, query_tile)});
    }
  }
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
