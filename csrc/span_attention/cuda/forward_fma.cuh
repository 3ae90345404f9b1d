#pragma once

#include "span_attention/cuda/online_softmax.cuh"
#include "span_attention/cuda/slice_stream.cuh"

namespace torchops::kernels::span_attention {

template <typename T>
inline constexpr size_t forward_fma_bytes =
    device::tile_bytes<T, fma_tile<T>, fma_tile<T>> + device::shared_size<T>(fma_tile<T>) +
    device::shared_size<Range>(fma_tile<T>) + slice_stream_bytes<T>;

// AttentionForward for float and double. A block of fma_threads for each tile of queries, grid
// [B * Hq * tiles]; values of at most value_slices slices.
template <typename T, int value_slices>
__global__ void __launch_bounds__(device::fma_threads) forward_fma(AttentionForward<T> args, bool wide) {
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
    } else {
      copy_slice_async(one, value, step - score_steps, first, visible.any.begin, visible.any.end, wide);
    }
    if (++step == score_steps + value_steps) {
      step = 0;
      first += tile;
    }
  };
  SliceStream<T, decltype(copy)> slices(memory, copy);

  T values[value_slices][r][4] = {};
  OnlineSoftmax<T> softmax[r];
  for (int64_t first = visible.any.begin; first < visible.any.end; first += tile) {
    T scores[r][r] = {};
    for (int step = 0; step < score_steps; ++step) {
      slices.next();
      device::multiply_slices(scores, slices.first(), slices.second());
    }
    const bool edge = visible.is_edge(first, tile);
#pragma unroll
    for (int i = 0; i < r; ++i) {
      const int2 seen =
          edge ? visible.within(device::fma_row() + device::fma_side * i, first, tile) : make_int2(0, tile);
      T largest = minus_infinity<T>;
#pragma unroll
      for (int j = 0; j < r; ++j) {
        const int column = device::fma_column() + device::fma_side * j;
        const T score = (scores[i][j] * inputs.scale + (key_bias == nullptr ? T(0) : bias[column])) * log2_e<T>;
        scores[i][j] = seen.x <= column && column < seen.y ? score : minus_infinity<T>;
        largest = device::max(largest, scores[i][j]);
      }
      const T factor = softmax[i].raise(over_row(largest, [](T a, T b) { return device::max(a, b); }));
#pragma unroll
      for (int j = 0; j < r; ++j) {
        scores[i][j] = device::fast_exp2(scores[i][j] - softmax[i].reference());
        softmax[i].sum += scores[i][j];
      }
#pragma unroll
      for (int s = 0; s < value_slices; ++s) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          values[s][i][e] *= factor;
        }
      }
    }
    device::store_weights(weights, scores);
#pragma unroll
    for (int s = 0; s < value_slices; ++s) {
      if (s < value_steps) {
        slices.next();
        device::multiply_weights(values[s], weights, slices.first());
      }
    }
  }

  T factors[r];
#pragma unroll
  for (int i = 0; i < r; ++i) {
    softmax[i].sum = over_row(softmax[i].sum, [](T a, T b) { return a + b; });
    factors[i] = softmax[i].finish(inputs.sink == nullptr ? nullptr : inputs.sink + unit.head);
    const int64_t row = unit.first + device::fma_row() + device::fma_side * i;
    if (args.logsumexp != nullptr && device::fma_column() == 0 && row < sizes.num_queries) {
      args.logsumexp[(unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row] = softmax[i].logsumexp();
    }
  }
  const auto output = matrix(args.output, unit.batch, unit.head, sizes.value_dim);
#pragma unroll
  for (int s = 0; s < value_slices; ++s) {
    device::store_slice(output, values[s], s, unit.first, sizes.num_queries, [&](int i) { return factors[i]; });
  }
}

}  // namespace torchops::kernels::span_attention
