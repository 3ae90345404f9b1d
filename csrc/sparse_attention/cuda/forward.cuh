#pragma once

#include "sparse_attention/cuda/warp_rows.cuh"

namespace torchops::kernels::sparse_attention {

// AttentionForward, a warp for each query of the tile, grid [units / num_warps].
// Four blocks on a multiprocessor: nvcc aims at seven for which it spills registers.
template <typename T>
__global__ void __launch_bounds__(num_threads, 4) forward(AttentionForward<T> args, SortedLists sorted) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const WarpMemory<A> memory;
  const int64_t unit = int64_t{blockIdx.x} * num_warps + device::warp_index();
  if (unit >= sorted.tile.units(sizes)) {
    return;
  }
  const auto [batch, head, query] = sorted.tile.place(unit, sizes.num_kv_heads, sizes.group_size());
  const int64_t kv_head = head / sizes.group_size();
  const int64_t list = query / inputs.rule.query_block, first = sorted.first_of(inputs, batch, head, list);
  const Sequence sequence = inputs.sequence(batch);
  const RowsOfHead<T> keys(inputs.key, batch, kv_head, sizes.head_dim);
  const RowsOfHead<T> values(inputs.value, batch, kv_head, sizes.value_dim);
  const A* key_bias = inputs.key_biases_of(batch);
  const A* pair_bias = inputs.biases_of(batch, head, list);
  load_row(memory.row, RowsOfHead<T>(inputs.query, batch, head, sizes.head_dim), query);

  RowSums<A> output;
  OnlineSoftmax<A> softmax;
  ListWalk<T> walk{inputs, sequence, sorted.begins + first, sorted.places_of(first),
                   end_of_keys(inputs.rule, sequence, query)};
  for (int key, place; walk.next(key, place);) {
    device::syncwarp();
    memory.numbers[device::lane_index()] = key;
    const A product = product_with_rows(memory, memory.row, keys);
    const A score =
        key < 0 ? minus_infinity<A> : score_of(product, inputs.scale, bias_of(key_bias, key, pair_bias, place));
    A largest = score;
    for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
      largest = device::max(largest, device::shuffle_xor(largest, bits));
    }
    output.rescale(softmax.raise(largest));
    const A weight = exponential(score - softmax.reference());
    softmax.sum += weight;
    memory.weights[device::lane_index()] = weight;
    output.add(memory, values);
  }

  softmax.sum = device::sum_of_warp(softmax.sum);
  const A factor = softmax.finish(inputs.sink == nullptr ? nullptr : inputs.sink + head);
  output.store(args.output.row(batch, head, query), sizes.value_dim, factor);
  if (device::lane_index() == 0) {
    store_softmax(args, softmax, (batch * sizes.num_heads + head) * sizes.num_queries + query);
  }
}

}  // namespace torchops::kernels::sparse_attention
