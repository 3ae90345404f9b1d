#pragma once

#include "sparse_attention/cuda/naming_queries.cuh"

namespace torchops::kernels::sparse_attention {

// One key, and what the queries whose lists name it add up to.
template <typename T>
struct KeyGradient {
  using A = accumulate_t<T>;

  const AttentionBackward<T>& args;
  const SortedLists& sorted;
  const WarpMemory<A>& memory;
  int64_t batch;
  int64_t kv_head;
  int64_t key;
  RowSums<A> key_sums;
  RowSums<A> value_sums;
  A bias_sum = 0;  // in every lane

  // The first `count` of the pending queries of a head, a lane for each.
  __device__ void add(int64_t head, int count) {
    const Attention<T>& inputs = args.inputs;
    const Sizes& sizes = inputs.sizes;
    const int lane = device::lane_index();
    const bool there = lane < count;
    const int64_t query = there ? memory.pending[lane] : 0;
    const int64_t index = (batch * sizes.num_heads + head) * sizes.num_queries + query;
    const int64_t list = query / inputs.rule.query_block;
    device::syncwarp();
    memory.numbers[lane] = there ? static_cast<int>(query) : -1;
    const RowsOfHead<T> queries(inputs.query, batch, head, sizes.head_dim);
    const RowsOfHead<T> grads(args.grad_output, batch, head, sizes.value_dim);
    const A product = product_with_rows(memory, memory.row, queries);
    A probability = 0, score_grad = 0;
    if (there) {
      const int32_t place =
          inputs.pair_bias == nullptr
              ? 0
              : sorted.places[sorted.first_of(inputs, batch, head, list) + memory.pending_entry[lane]];
      const A* key_bias = inputs.key_biases_of(batch);
      const A bias = bias_of(key_bias, key, inputs.biases_of(batch, head, list), place);
      probability = probability_of(score_of(product, inputs.scale, bias), args.normalizer[index]);
    }
    if (args.grad_value.data != nullptr) {
      memory.weights[lane] = probability;
      value_sums.add(memory, grads, count);
    }
    if (args.delta == nullptr) {
      return;  // no gradient to scores is wanted
    }
    const A of_value = product_with_rows(memory, memory.other_row, grads);
    if (there) {
      score_grad = score_gradient_of(probability, of_value, args.delta[index]);
    }
    if (args.grad_key_bias != nullptr) {
      // One after the other: where a head's queries are cut into tiles does not show.
      for (int other = 0; other < count; ++other) {
        bias_sum += device::shuffle(score_grad, other);
      }
    }
    if (args.grad_key.data != nullptr) {
      device::syncwarp();
      memory.weights[lane] = score_grad;
      key_sums.add(memory, queries, count);
    }
  }
};

// AttentionBackward's grad_key, grad_value and grad_key_bias, a warp for each key, grid [B * Hkv * Lk / num_warps]:
// what the tile's queries add to what those of the tiles before have.
template <typename T>
__global__ void __launch_bounds__(num_threads)
    key_gradient(AttentionBackward<T> args, SortedLists sorted, CarriedSums<accumulate_t<T>> carried) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const WarpMemory<A> memory;
  const int64_t index = int64_t{blockIdx.x} * num_warps + device::warp_index();
  if (index >= sizes.batch * sizes.num_kv_heads * sizes.num_keys) {
    return;
  }
  const int64_t key = index % sizes.num_keys, kv_head = index / sizes.num_keys % sizes.num_kv_heads;
  const int64_t batch = index / sizes.num_keys / sizes.num_kv_heads;
  load_row(memory.row, RowsOfHead<T>(inputs.key, batch, kv_head, sizes.head_dim), key);
  if (inputs.value.data != nullptr) {
    load_row(memory.other_row, RowsOfHead<T>(inputs.value, batch, kv_head, sizes.value_dim), key);
  }
  KeyGradient<T> gradient{args, sorted, memory, batch, kv_head, key, {}, {}};
  const QueryTile& tile = sorted.tile;
  const bool to_keys = args.grad_key.data != nullptr, to_values = args.grad_value.data != nullptr;
  if (!tile.is_first()) {
    if (to_keys) {
      gradient.key_sums.load(carried.keys + index * sizes.head_dim, sizes.head_dim);
    }
    if (to_values) {
      gradient.value_sums.load(carried.values + index * sizes.value_dim, sizes.value_dim);
    }
    if (args.grad_key_bias != nullptr) {
      gradient.bias_sum = args.grad_key_bias[index];
    }
  }
  for (int64_t in_group = tile.first_head; in_group < tile.first_head + tile.num_heads; ++in_group) {
    device::syncwarp();
    const int64_t head = kv_head * sizes.group_size() + in_group;
    for_naming_queries(inputs, sorted, memory, batch, head, key, [&](int count) { gradient.add(head, count); });
  }
  if (!tile.is_last(sizes)) {
    if (to_keys) {
      gradient.key_sums.store(carried.keys + index * sizes.head_dim, sizes.head_dim, A(1));
    }
    if (to_values) {
      gradient.value_sums.store(carried.values + index * sizes.value_dim, sizes.value_dim, A(1));
    }
  } else {
    if (to_keys) {
      gradient.key_sums.store(args.grad_key.row(batch, kv_head, key), sizes.head_dim, inputs.scale);
    }
    if (to_values) {
      gradient.value_sums.store(args.grad_value.row(batch, kv_head, key), sizes.value_dim, A(1));
    }
  }
  if (args.grad_key_bias != nullptr && device::lane_index() == 0) {
    args.grad_key_bias[index] = gradient.bias_sum;
  }
}

}  // namespace torchops::kernels::sparse_attention
