#pragma once

#include "span_attention/cuda/slice_stream.cuh"
#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

// For rows of at most value_slices slices.
template <typename T, int value_slices>
struct ForwardSlices {
  static constexpr int rows_per_thread = fma_rows_per_thread<T, value_slices>;
  static constexpr int tile = fma_tile<T, value_slices>;
  static constexpr size_t shared_bytes = device::tile_bytes<T, tile, tile> + device::shared_size<T>(tile) +
                                         device::shared_size<int2>(tile) + slice_stream_bytes<T, tile>;
};

// AttentionForward for float and double. A block of fma_threads for each tile of queries, grid
// [B * Hq * tiles]; values of at most value_slices slices.
template <typename T, int value_slices>
__global__ void __launch_bounds__(device::fma_threads, 1) forward_fma(AttentionForward<T> args, bool wide) {
  using Slices = ForwardSlices<T, value_slices>;
  constexpr int r = Slices::rows_per_thread, tile = Slices::tile;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const HeadTile unit = HeadTile::of_block_from_last(sizes.num_queries, sizes.num_heads, tile);
  const int kv_head = unit.head / static_cast<int>(sizes.group_size());
  const int num_queries = static_cast<int>(sizes.num_queries);
  device::SharedMemory memory;
  T* weights = memory.take<T>(tile * device::tile_stride<T, tile>);
  T* bias = memory.take<T>(tile);
  int2* of_row = memory.take<int2>(tile);
  const VisibleRange visible =
      visible_range(VisibleKeys{inputs.span, inputs.sequence(unit.batch)}, unit.first, num_queries, tile, of_row);

  const auto query = matrix(inputs.query, unit.batch, unit.head, sizes.head_dim);
  const auto key = matrix(inputs.key, unit.batch, kv_head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, kv_head, sizes.value_dim);
  const T* key_bias = inputs.key_bias == nullptr ? nullptr : inputs.key_bias + unit.batch * sizes.num_keys;
  const int score_steps = num_slices(sizes.head_dim), value_steps = num_slices(sizes.value_dim);
  auto copy = [&, first = visible.begin, step = 0](T* one, T* other) mutable {
    if (first >= visible.end) {
      return;
    }
    if (step < score_steps) {
      copy_slice_async<tile>(one, query, step, unit.first, num_queries, wide);
      copy_slice_async<tile>(other, key, step, first, visible.end, wide);
      if (step == 0 && key_bias != nullptr) {
        copy_numbers_async(bias, key_bias, first, tile, visible.end);
      }
    } else {
      copy_slice_async<tile>(one, value, step - score_steps, first, visible.end, wide);
    }
    if (++step == score_steps + value_steps) {
      step = 0;
      first += tile;
    }
  };
  SliceStream<T, tile, decltype(copy)> slices(memory, copy);

  T values[value_slices][r][4] = {};
  OnlineSoftmax<T> softmax[r];
  for (int first = visible.begin; first < visible.end; first += tile) {
    T scores[r][r] = {};
    for (int step = 0; step < score_steps; ++step) {
      slices.next();
      device::multiply_slices(scores, slices.first(), slices.second());
    }
    const bool edge = visible.is_edge(first, tile);
#pragma unroll
    for (int i = 0; i < r; ++i) {
      const int2 seen = visible.seen_by(device::fma_row() + device::fma_side * i, edge, first, tile);
      T largest = minus_infinity<T>;
#pragma unroll
      for (int j = 0; j < r; ++j) {
        const int column = device::fma_column() + device::fma_side * j;
        const T score = score_of(scores[i][j], inputs.scale, key_bias == nullptr ? T(0) : bias[column]);
        scores[i][j] = seen.x <= first + column && first + column < seen.y ? score : minus_infinity<T>;
        largest = device::max(largest, scores[i][j]);
      }
      const T factor = softmax[i].raise(over_row(largest, [](T a, T b) { return device::max(a, b); }));
#pragma unroll
      for (int j = 0; j < r; ++j) {
        scores[i][j] = exponential(scores[i][j] - softmax[i].reference());
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
    const int row = unit.first + device::fma_row() + device::fma_side * i;
    if (device::fma_column() == 0 && row < num_queries) {
      store_softmax(args, softmax[i], (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row);
    }
  }
  const auto output = matrix(args.output, unit.batch, unit.head, sizes.value_dim);
#pragma unroll
  for (int s = 0; s < value_slices; ++s) {
    device::store_slice(output, values[s], s, unit.first, num_queries, [&](int i) { return factors[i]; });
  }
}

}  // namespace torchops::kernels::span_attention
