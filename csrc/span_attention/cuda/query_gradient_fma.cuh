#pragma once

#include "span_attention/cuda/slice_stream.cuh"
#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

// For rows of at most query_slices slices.
template <typename T, int query_slices>
struct QueryGradientSlices {
  static constexpr int rows_per_thread = fma_rows_per_thread<T, query_slices>;
  static constexpr int tile = fma_tile<T, query_slices>;
  static constexpr size_t shared_bytes = device::tile_bytes<T, tile, tile> + device::shared_size<T>(tile) +
                                         device::shared_size<int2>(tile) + slice_stream_bytes<T, tile>;
};

// AttentionBackward's grad_query for float and double. A block of fma_threads for each tile of queries, grid
// [B * Hq * tiles]; queries of at most query_slices slices.
template <typename T, int query_slices>
__global__ void __launch_bounds__(device::fma_threads, 1) query_gradient_fma(AttentionBackward<T> args, bool wide) {
  using Slices = QueryGradientSlices<T, query_slices>;
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
  const auto grad_output = matrix(args.grad_output, unit.batch, unit.head, sizes.value_dim);
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
    } else if (step < score_steps + value_steps) {
      copy_slice_async<tile>(one, grad_output, step - score_steps, unit.first, num_queries, wide);
      copy_slice_async<tile>(other, value, step - score_steps, first, visible.end, wide);
    } else {
      copy_slice_async<tile>(one, key, step - score_steps - value_steps, first, visible.end, wide);
    }
    if (++step == 2 * score_steps + value_steps) {
      step = 0;
      first += tile;
    }
  };
  SliceStream<T, tile, decltype(copy)> slices(memory, copy);

  Normalizer<T> normalizers[r];
  T delta[r];
#pragma unroll
  for (int i = 0; i < r; ++i) {
    const int row = unit.first + device::fma_row() + device::fma_side * i;
    const int64_t index = (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row;
    normalizers[i] = row < num_queries ? args.normalizer[index] : make_normalizer(T(0), T(0));
    delta[i] = row < num_queries ? args.delta[index] : T(0);
  }
  T gradient[query_slices][r][4] = {};
  for (int first = visible.begin; first < visible.end; first += tile) {
    T scores[r][r] = {}, products[r][r] = {};
    for (int step = 0; step < score_steps; ++step) {
      slices.next();
      device::multiply_slices(scores, slices.first(), slices.second());
    }
    const bool edge = visible.is_edge(first, tile);
#pragma unroll
    for (int i = 0; i < r; ++i) {
      const int2 seen = visible.seen_by(device::fma_row() + device::fma_side * i, edge, first, tile);
#pragma unroll
      for (int j = 0; j < r; ++j) {
        const int column = device::fma_column() + device::fma_side * j;
        const T score = score_of(scores[i][j], inputs.scale, key_bias == nullptr ? T(0) : bias[column]);
        const bool is_seen = seen.x <= first + column && first + column < seen.y;
        scores[i][j] = is_seen ? probability_of(score, normalizers[i]) : T(0);
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
        scores[i][j] = score_gradient_of(scores[i][j], products[i][j], delta[i]);
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
    device::store_slice(grad_query, gradient[s], s, unit.first, num_queries, [&](int) { return inputs.scale; });
  }
}

}  // namespace torchops::kernels::span_attention
