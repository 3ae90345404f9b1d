#pragma once

#include "sparse_attention/cuda/warp_rows.cuh"

namespace torchops::kernels::sparse_attention {

// AttentionBackward's grad_query and grad_pair_bias. A warp for queries_of_warp queries, one after the other: all that
// share a list where the gradient to its biases is wanted; grid [units of the tile / num_warps].
// Four blocks on a multiprocessor: nvcc aims at seven for which it spills registers.
template <typename T>
__global__ void __launch_bounds__(num_threads, 4)
    query_gradient(AttentionBackward<T> args, SortedLists sorted, int64_t queries_of_warp) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const WarpMemory<A> memory;
  const QueryTile& tile = sorted.tile;
  const int64_t unit = int64_t{blockIdx.x} * num_warps + device::warp_index();
  if (unit >= tile.units(sizes, queries_of_warp)) {
    return;
  }
  const auto [batch, head, first_query] = tile.place(unit, sizes.num_kv_heads, sizes.group_size(), queries_of_warp);
  const int64_t kv_head = head / sizes.group_size();
  const Sequence sequence = inputs.sequence(batch);
  const RowsOfHead<T> keys(inputs.key, batch, kv_head, sizes.head_dim);
  const RowsOfHead<T> values(inputs.value, batch, kv_head, sizes.value_dim);
  const A* key_bias = inputs.key_biases_of(batch);
  for (int64_t query = first_query; query < first_query + queries_of_warp && query < tile.end_of_queries(); ++query) {
    const int64_t list = query / inputs.rule.query_block, first = sorted.first_of(inputs, batch, head, list);
    const int64_t index = (batch * sizes.num_heads + head) * sizes.num_queries + query;
    const A* pair_bias = inputs.biases_of(batch, head, list);
    A* pair_grads = args.grad_biases_of(batch, head, list);
    device::syncwarp();
    load_row(memory.row, RowsOfHead<T>(inputs.query, batch, head, sizes.head_dim), query);
    load_row(memory.other_row, RowsOfHead<T>(args.grad_output, batch, head, sizes.value_dim), query);
    RowSums<A> sums;
    ListWalk<T> walk{inputs, sequence, sorted.begins + first, sorted.places_of(first),
                     end_of_keys(inputs.rule, sequence, query)};
    for (int key, place; walk.next(key, place);) {
      device::syncwarp();
      memory.numbers[device::lane_index()] = key;
      const A product = product_with_rows(memory, memory.row, keys);
      const A probability =
          key < 0 ? A(0)
                  : probability_of(score_of(product, inputs.scale, bias_of(key_bias, key, pair_bias, place)),
                                   args.normalizer[index]);
      const A of_value = product_with_rows(memory, memory.other_row, values);
      const A score_grad = score_gradient_of(probability, of_value, args.delta[index]);
      if (pair_grads != nullptr && inputs.rule.block_size == 1 && key >= 0) {
        pair_grads[place] += score_grad;
      }
      if (pair_grads != nullptr && inputs.rule.block_size > 1) {
        const A of_entry = device::sum_of_warp(score_grad);
        if (device::lane_index() == 0) {
          pair_grads[place] += of_entry;
        }
      }
      if (args.grad_query.data != nullptr) {
        memory.weights[device::lane_index()] = score_grad;
        sums.add(memory, keys);
      }
    }
    if (args.grad_query.data != nullptr) {
      sums.store(args.grad_query.row(batch, head, query), sizes.head_dim, inputs.scale);
    }
  }
}

}  // namespace torchops::kernels::sparse_attention
