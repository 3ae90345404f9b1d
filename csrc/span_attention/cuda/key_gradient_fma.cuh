#pragma once

#include "span_attention/cuda/slice_stream.cuh"
#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

// For rows of at most slices_of_row slices.
template <typename T, int slices_of_row>
struct KeyGradientSlices {
  static constexpr int rows_per_thread = fma_rows_per_thread<T, 2 * slices_of_row>;
  static constexpr int tile = fma_tile<T, 2 * slices_of_row>;
  static constexpr size_t shared_bytes = device::tile_bytes<T, tile, tile> + device::shared_size<Normalizer<T>>(tile) +
                                         device::shared_size<T>(tile) + device::shared_size<int2>(tile) +
                                         slice_stream_bytes<T, tile>;
};

// AttentionBackward's grad_key, grad_value and grad_key_bias for float and double. A block of fma_threads for each
// tile of keys, grid [B * Hkv * tiles], goes through the queries of all heads of its group; queries and values of
// at most num_slices slices.
template <typename T, int slices_of_row>
__global__ void __launch_bounds__(device::fma_threads, 1) key_gradient_fma(AttentionBackward<T> args, bool wide) {
  using Slices = KeyGradientSlices<T, slices_of_row>;
  constexpr int r = Slices::rows_per_thread, tile = Slices::tile;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const HeadTile unit = HeadTile::of_block(sizes.num_keys, sizes.num_kv_heads, tile);
  const int group_size = static_cast<int>(sizes.group_size());
  const bool wants_key = args.grad_key.data != nullptr, wants_value = args.grad_value.data != nullptr;
  const bool wants_scores = wants_key || args.grad_key_bias != nullptr;
  const int num_keys = static_cast<int>(sizes.num_keys);
  device::SharedMemory memory;
  T* weights = memory.take<T>(tile * device::tile_stride<T, tile>);
  auto* normalizer = memory.take<Normalizer<T>>(tile);
  T* delta = memory.take<T>(tile);
  int2* of_row = memory.take<int2>(tile);
  const VisibleRange visible =
      visible_range(VisibleQueries{inputs.span, inputs.sequence(unit.batch)}, unit.first, num_keys, tile, of_row);

  const auto key = matrix(inputs.key, unit.batch, unit.head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, unit.head, sizes.value_dim);
  const int score_steps = num_slices(sizes.head_dim), value_steps = num_slices(sizes.value_dim);
  // Steps of a tile of queries: scores, products with the values, gradient to values, gradient to keys.
  // Without a gradient to the output that of products is empty, for its barrier.
  const int product_steps = value_steps > 0 ? value_steps : 1;
  const int product_end = score_steps + (wants_scores ? product_steps : 0);
  const int value_end = product_end + (wants_value ? value_steps : 0);
  const int key_end = value_end + (wants_key ? score_steps : 0);
  auto copy = [&, first = visible.begin, step = 0, member = 0](T* one, T* other) mutable {
    if (first >= visible.end || member == group_size) {
      return;
    }
    const int head = unit.head * group_size + member;
    const auto query = matrix(inputs.query, unit.batch, head, sizes.head_dim);
    const auto grad_output = matrix(args.grad_output, unit.batch, head, sizes.value_dim);
    const int64_t numbers = (unit.batch * sizes.num_heads + head) * sizes.num_queries;
    const auto copy_queries = [&](T* to, const device::MatrixRows<const T>& from, int s) {
      copy_slice_async<tile>(to, from, s, first, visible.end, wide);
    };
    const auto copy_keys = [&](T* to, const device::MatrixRows<const T>& from, int s) {
      copy_slice_async<tile>(to, from, s, unit.first, num_keys, wide);
    };
    // Numbers of the queries come with the first step that is followed by another before they are read.
    if (step == 0) {
      copy_numbers_async(normalizer, args.normalizer + numbers, first, tile, visible.end);
    }
    if (step == score_steps && wants_scores) {
      copy_numbers_async(delta, args.delta + numbers, first, tile, visible.end);
    }
    if (step < score_steps) {
      copy_keys(one, key, step);
      copy_queries(other, query, step);
    } else if (step < product_end) {
      if (value_steps > 0) {
        copy_keys(one, value, step - score_steps);
        copy_queries(other, grad_output, step - score_steps);
      }
    } else if (step < value_end) {
      copy_queries(one, grad_output, step - product_end);
    } else {
      copy_queries(one, query, step - value_end);
    }
    if (++step == key_end) {
      step = 0;
      first += tile;
      if (first >= visible.end) {
        first = visible.begin;
        ++member;
      }
    }
  };
  SliceStream<T, tile, decltype(copy)> slices(memory, copy);

  T bias[r], bias_gradient[r] = {};
#pragma unroll
  for (int i = 0; i < r; ++i) {
    const int row = unit.first + device::fma_row() + device::fma_side * i;
    const bool given = inputs.key_bias != nullptr && row < num_keys;
    bias[i] = given ? inputs.key_bias[unit.batch * sizes.num_keys + row] : T(0);
  }
  T key_gradient[slices_of_row][r][4] = {}, value_gradient[slices_of_row][r][4] = {};
  for (int member = 0; member < group_size; ++member) {
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
#pragma unroll
        for (int j = 0; j < r; ++j) {
          const int column = device::fma_column() + device::fma_side * j;
          const T score = score_of(scores[i][j], inputs.scale, bias[i]);
          const bool is_seen = seen.x <= first + column && first + column < seen.y;
          scores[i][j] = is_seen ? probability_of(score, normalizer[column]) : T(0);
        }
      }
      T score_gradient[r][r] = {};
      if (wants_scores) {
        for (int step = 0; step < product_steps; ++step) {
          slices.next();
          if (value_steps > 0) {
            device::multiply_slices(score_gradient, slices.first(), slices.second());
          }
        }
#pragma unroll
        for (int i = 0; i < r; ++i) {
#pragma unroll
          for (int j = 0; j < r; ++j) {
            const T of_query = delta[device::fma_column() + device::fma_side * j];
            score_gradient[i][j] = score_gradient_of(scores[i][j], score_gradient[i][j], of_query);
            bias_gradient[i] += score_gradient[i][j];
          }
        }
      }
      if (wants_value) {
        device::store_weights(weights, scores);
#pragma unroll
        for (int s = 0; s < slices_of_row; ++s) {
          if (s < value_steps) {
            slices.next();
            device::multiply_weights(value_gradient[s], weights, slices.first());
          }
        }
      }
      if (wants_key) {
        device::syncthreads();  // the weights have been read
        device::store_weights(weights, score_gradient);
#pragma unroll
        for (int s = 0; s < slices_of_row; ++s) {
          if (s < score_steps) {
            slices.next();
            device::multiply_weights(key_gradient[s], weights, slices.first());
          }
        }
      }
    }
  }

  if (wants_key) {
    const auto grad_key = matrix(args.grad_key, unit.batch, unit.head, sizes.head_dim);
#pragma unroll
    for (int s = 0; s < slices_of_row; ++s) {
      device::store_slice(grad_key, key_gradient[s], s, unit.first, num_keys, [&](int) { return inputs.scale; });
    }
  }
  if (wants_value) {
    const auto grad_value = matrix(args.grad_value, unit.batch, unit.head, sizes.value_dim);
#pragma unroll
    for (int s = 0; s < slices_of_row; ++s) {
      device::store_slice(grad_value, value_gradient[s], s, unit.first, num_keys, [](int) { return T(1); });
    }
  }
  if (args.grad_key_bias != nullptr) {
#pragma unroll
    for (int i = 0; i < r; ++i) {
      const T sum = over_row(bias_gradient[i], [](T a, T b) { return a + b; });
      const int row = unit.first + device::fma_row() + device::fma_side * i;
      if (device::fma_column() == 0 && row < num_keys) {
        args.grad_key_bias[(unit.batch * sizes.num_kv_heads + unit.head) * sizes.num_keys + row] = sum;
      }
    }
  }
}

}  // namespace torchops::kernels::span_attention
