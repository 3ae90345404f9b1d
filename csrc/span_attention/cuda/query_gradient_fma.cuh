#pragma once

#include "span_attention/cuda/slice_stream.cuh"
#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

template <typename T>
inline constexpr size_t query_gradient_fma_bytes =
    device::tile_bytes<T, fma_tile<T>, fma_tile<T>> + device::shared_size<T>(fma_tile<T>) +
    device::shared_size<Range>(fma_tile<T>) + slice_stream_bytes<T>;

// AttentionBackward's grad_query for float and double. A block of fma_threads for each tile of queries, grid
// [B * Hq * tiles]; queries of at most query_slices slices.
template <typename T, int query_slices>
__global__ void __launch_bounds__(device::fma_threads) query_gradient_fma(AttentionBackward<T> args, bool wide) {
  constexpr int r = fma_rows_per_thread<T>, tile = fma_tile<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const HeadTile unit = HeadTile::of_block_from_last(sizes.num_queries, sizes.num_heads, tile);
  const int64_t kv_head = unit.head / sizes.group_size();
  device::SharedMemory memory;
  T* weights = memory.take<T>(tile * device::tile_stride<T, tile>);
  T* bias = memory.take<T>(tile);
  Range* of_row = memory.take<Range>(tile);
  const VisibleRange visible =
      visible_range(VisibleKeys{inputs.span, inputs.sequence(unit.batch)}, unit.first, sizes.num_queries, tile, of_row);

  const auto query = matrix(inputs.query, unit.batch, unit.head, sizes.head_dim);
  const auto key = matrix(inputs.key, unit.batch, kv_head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, kv_head, sizes.value_dim);
  const auto grad_output = matrix(args.grad_output, unit.batch, unit.head, sizes.value_dim);
  const T* key_bias = inputs.key_bias == nullptr ? nullptr : inputs.key_bias + unit.batch * sizes.num_keys;
  const int score_steps = num_slices(sizes.head_dim), value_steps = num_slices(sizes.value_dim);
  auto copy = [&, first = visible.any.begin, step = 0](T* one, T* other) mutable {
    if (first >= visible.any.end) {
      return;
    }
    if (step < score_steps) {
      copy_slice_async(one, query, step, unit.first, 0, sizes.num_queries, wide);
      copy_slice_async(other, key, step, first, visible.any.begin, visible.any.end, wide);
      if (step == 0 && key_bias != nullptr) {
        copy_numbers_async(bias, key_bias, first, tile, visible.any.begin, visible.any.end);
      }
    } else if (step < score_steps + value_steps) {
      copy_slice_async(one, grad_output, step - score_steps, unit.first, 0, sizes.num_queries, wide);
      copy_slice_async(other, value, step - score_steps, first, visible.any.begin, visible.any.end, wide);
    } else {
      copy_slice_async(one, key, step - score_steps - value_steps, first, visible.any.begin, visible.any.end, wide);
    }
    if (++step == 2 * score_steps + value_steps) {
      step = 0;
      first += tile;
    }
  };
  SliceStream<T, decltype(copy)> slices(memory, copy);

  T log2_sums[r], delta[r];
#pragma unroll
  for (int i = 0; i < r; ++i) {
    const int64_t row = unit.first + device::fma_row() + device::fma_side * i;
    const int64_t index = (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row;
    log2_sums[i] = log2_sum(row < sizes.num_queries ? args.logsumexp[index] : minus_infinity<T>);
    delta[i] = row < sizes.num_queries ? args.delta[index] : T(0);
  }
  T gradient[query_slices][r][4] = {};
  for (int64_t first = visible.any.begin; first < visible.any.end; first += tile) {
    T scores[r][r] = {}, products[r][r] = {};
    for (int step = 0; step < score_steps; ++step) {
      slices.next();
      device::multiply_slices(scores, slices.first(), slices.second());
    }
    const bool edge = visible.is_edge(first, tile);
#pragma unroll
    for (int i = 0; i < r; ++i) {
      const int2 seen =
          edge ? visible.within(device::fma_row() + device::fma_side * i, first, tile) : make_int2(0, tile);
#pragma unroll
      for (int j = 0; j < r; ++j) {
        const int column = device::fma_column() + device::fma_side * j;
        const T score = (scores[i][j] * inputs.scale + (key_bias == nullptr ? T(0) : bias[column])) * log2_e<T>;
        const bool is_seen = seen.x <= column && column < seen.y;
        scores[i][j] = is_seen ? device::fast_exp2(score - log2_sums[i]) : T(0);
      }
    }
    for (int step = 0; step < value_steps; ++step) {
      slices.next();
      device::multiply_slices(products, slices.first(), slices.second());
    }
#pragma unroll
    for (int i = 0; i < r; ++i) {
#pragma unroll
      for (int j = 0; j < r; ++j) {
        scores[i][j] *= products[i][j] - delta[i];
      }
    }
    device::store_weights(weights, scores);
#pragma unroll
    for (int s = 0; s < query_slices; ++s) {
      if (s < score_steps) {
        slices.next();
        device::multiply_weights(gradient[s], weights, slices.first());
      }
    }
  }

  const auto grad_query = matrix(args.grad_query, unit.batch, unit.head, sizes.head_dim);
#pragma unroll
  for (int s = 0; s < query_slices; ++s) {
    device::store_slice(grad_query, gradient[s], s, unit.first, sizes.num_queries, [&](int) { return inputs.scale; });
  }
}

}  // namespace torchops::kernels::span_attention
