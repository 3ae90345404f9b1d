#pragma once

#include "sparse_attention/cuda/naming_queries.cuh"
#include "sparse_attention/scores.h"

namespace torchops::kernels::sparse_attention {

// Columns that a warp computes one after the other, so that its query is read once for them.
inline constexpr int columns_of_warp = 256;

// A query of [B, Hq, Lq], and the keys of its columns.
template <typename T>
struct QueryColumns {
  const Attention<T>& inputs;
  int64_t batch, head, query;
  int64_t list_head, list;
  Sequence sequence;

  __device__ QueryColumns(const Attention<T>& inputs, int64_t row)
      : inputs(inputs),
        batch(row / inputs.sizes.num_queries / inputs.sizes.num_heads),
        head(row / inputs.sizes.num_queries % inputs.sizes.num_heads),
        query(row % inputs.sizes.num_queries),
        list_head(inputs.list_head(head)),
        list(query / inputs.rule.query_block),
        sequence(inputs.sequence(batch)) {}

  __device__ RowsOfHead<T> keys() const {
    return {inputs.key, batch, head / inputs.sizes.group_size(), inputs.sizes.head_dim};
  }

  // Negative for a column that has no key which the query sees, or lies behind the last.
  __device__ int key_of(int64_t column) const {
    if (column >= num_columns(inputs)) {
      return -1;
    }
    const Lists& lists = inputs.lists;
    // Both are at most 2^30, and a division of 64 bits is a call that registers have to be saved for.
    const int number = static_cast<int>(column), block_size = static_cast<int>(inputs.rule.block_size);
    const int place = number / block_size, offset = number % block_size;
    const int64_t entry = lists.wide.data == nullptr ? int64_t{lists.narrow.row(batch, list_head, list)[place]}
                                                     : lists.wide.row(batch, list_head, list)[place];
    if (listed_keys(inputs.rule, sequence, entry).empty()) {
      return -1;
    }
    const int64_t key = first_column_key(inputs.rule, sequence, entry) + offset;
    return key < end_of_keys(inputs.rule, sequence, query) ? static_cast<int>(key) : -1;
  }
};

// Scores, a warp for columns_of_warp columns of a query, grid [B * Hq * Lq * such shares of a row / num_warps].
template <typename T>
__global__ void __launch_bounds__(num_threads) scores(Scores<T> args) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const WarpMemory<A> memory;
  const int64_t columns = num_columns(inputs), shares = (columns + columns_of_warp - 1) / columns_of_warp;
  const int64_t unit = int64_t{blockIdx.x} * num_warps + device::warp_index();
  if (unit >= sizes.batch * sizes.num_heads * sizes.num_queries * shares) {
    return;
  }
  const QueryColumns<T> row(inputs, unit / shares);
  const RowsOfHead<T> keys = row.keys();
  load_row(memory.row, RowsOfHead<T>(inputs.query, row.batch, row.head, sizes.head_dim), row.query);
  A* to = args.scores.row(row.batch, row.head, row.query);
  const int64_t begin = unit % shares * columns_of_warp;
  for (int64_t first = begin; first < begin + columns_of_warp && first < columns; first += device::warp_size) {
    const int64_t column = first + device::lane_index();
    const int key = row.key_of(column);
    memory.numbers[device::lane_index()] = key;
    const A product = product_with_rows(memory, memory.row, keys);
    if (column < columns) {
      to[column] = key < 0 ? minus_infinity<A> : product * inputs.scale;
    }
  }
}

// ScoreGradients's grad_query, a warp for each query, grid [B * Hq * Lq / num_warps].
template <typename T>
__global__ void __launch_bounds__(num_threads) score_query_gradient(ScoreGradients<T> args) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const WarpMemory<A> memory;
  const int64_t unit = int64_t{blockIdx.x} * num_warps + device::warp_index();
  if (unit >= sizes.batch * sizes.num_heads * sizes.num_queries) {
    return;
  }
  const QueryColumns<T> row(inputs, unit);
  const RowsOfHead<T> keys = row.keys();
  const A* grad = args.grad.row(row.batch, row.head, row.query);
  RowSums<A> sums;
  for (int64_t first = 0; first < num_columns(inputs); first += device::warp_size) {
    const int64_t column = first + device::lane_index();
    const int key = row.key_of(column);
    device::syncwarp();
    memory.numbers[device::lane_index()] = key;
    memory.weights[device::lane_index()] = key < 0 ? A(0) : grad[column];
    sums.add(memory, keys);
  }
  sums.store(args.grad_query.row(row.batch, row.head, row.query), sizes.head_dim, inputs.scale);
}

// ScoreGradients's grad_key, a warp for each key, grid [B * Hkv * Lk / num_warps].
template <typename T>
__global__ void __launch_bounds__(num_threads) score_key_gradient(ScoreGradients<T> args, SortedLists sorted) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const WarpMemory<A> memory;
  const int64_t index = int64_t{blockIdx.x} * num_warps + device::warp_index();
  if (index >= sizes.batch * sizes.num_kv_heads * sizes.num_keys) {
    return;
  }
  const int64_t key = index % sizes.num_keys, kv_head = index / sizes.num_keys % sizes.num_kv_heads;
  const int64_t batch = index / sizes.num_keys / sizes.num_kv_heads, lane = device::lane_index();
  const int64_t block_size = inputs.rule.block_size;
  const int64_t offset = block_size == 1 ? 0 : (inputs.sequence(batch).key_start + key) % block_size;
  RowSums<A> sums;
  for (int64_t head = kv_head * sizes.group_size(); head < (kv_head + 1) * sizes.group_size(); ++head) {
    const RowsOfHead<T> queries(inputs.query, batch, head, sizes.head_dim);
    for_naming_queries(inputs, sorted, memory, batch, head, key, [&](int count) {
      const bool there = lane < count;
      const int query = there ? memory.pending[lane] : -1;
      memory.numbers[lane] = query;
      memory.weights[lane] = 0;
      if (there) {
        const int64_t first = sorted.first_of(inputs, batch, head, query / inputs.rule.query_block);
        const int64_t column = sorted.places[first + memory.pending_entry[lane]] * block_size + offset;
        memory.weights[lane] = args.grad.row(batch, head, query)[column];
      }
      sums.add(memory, queries, count);
    });
  }
  sums.store(args.grad_key.row(batch, kv_head, key), sizes.head_dim, inputs.scale);
}

}  // namespace torchops::kernels::sparse_attention
