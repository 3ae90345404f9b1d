#pragma once

#include "span_attention/cuda/scores_mma.cuh"

namespace torchops::kernels::span_attention {

// For queries of at most D elements and values of at most V. Gradients to long rows do not fit into a warp's
// registers: two warps then share the rows of keys, each with half of the columns.
template <int D, int V>
struct KeyGradientTile {
  static constexpr int column_parts = D <= 128 ? 1 : 2;
  static constexpr int row_blocks = D <= 64 ? 2 : 1;
  static constexpr int keys = mma_warps / column_parts * 16 * row_blocks;
  static constexpr int queries = D <= 192 ? 32 : 16;

  template <typename T>
  static constexpr size_t shared_bytes =
      device::tile_bytes<T, keys, D> + device::tile_bytes<T, keys, V> + 2 * device::tile_bytes<T, queries, D> +
      2 * device::tile_bytes<T, queries, V> + device::shared_size<Normalizer<float>>(2 * queries) +
      device::shared_size<float>(2 * queries) + device::shared_size<int2>(keys);
};

// AttentionBackward's grad_key, grad_value and grad_key_bias for 16-bit types. A block of mma_threads for each tile
// of keys, grid [B * Hkv * tiles], goes through the queries of all heads of its group, which have two buffers.
// Scores are transposed: a row of an accumulator is a key.
template <typename T, int D, int V>
__global__ void __launch_bounds__(mma_threads) key_gradient_mma(AttentionBackward<T> args, bool wide) {
  using Tile = KeyGradientTile<D, V>;
  constexpr int m = Tile::row_blocks, n = Tile::queries / 8;
  constexpr int key_columns = D / Tile::column_parts, value_columns = V / Tile::column_parts;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const HeadTile unit = HeadTile::of_block(sizes.num_keys, sizes.num_kv_heads, Tile::keys);
  const int group_size = static_cast<int>(sizes.group_size());
  const bool wants_key = args.grad_key.data != nullptr, wants_value = args.grad_value.data != nullptr;
  const bool wants_scores = wants_key || args.grad_key_bias != nullptr;
  const bool has_grads = sizes.value_dim > 0, has_products = has_grads && wants_scores;
  const int num_keys = static_cast<int>(sizes.num_keys);
  device::SharedMemory memory;
  T* keys = memory.take<T>(Tile::keys * device::tile_stride<T, D>);
  T* values = memory.take<T>(Tile::keys * device::tile_stride<T, V>);
  T* both_queries = memory.take<T>(2 * Tile::queries * device::tile_stride<T, D>);
  T* both_grads = memory.take<T>(2 * Tile::queries * device::tile_stride<T, V>);
  auto* both_normalizers = memory.take<Normalizer<float>>(2 * Tile::queries);
  float* both_delta = memory.take<float>(2 * Tile::queries);
  int2* of_row = memory.take<int2>(Tile::keys);
  const VisibleRange visible =
      visible_range(VisibleQueries{inputs.span, inputs.sequence(unit.batch)}, unit.first, num_keys, Tile::keys, of_row);
  const int begin = visible.begin, end = visible.end;

  const auto copy_queries = [&](int member, int first, int buffer) {
    if (first >= end || member == group_size) {
      return;
    }
    const int head = unit.head * group_size + member;
    const int64_t numbers = (unit.batch * sizes.num_heads + head) * sizes.num_queries;
    device::copy_tile_async<Tile::queries, D, mma_threads>(
        both_queries + buffer * Tile::queries * device::tile_stride<T, D>,
        matrix(inputs.query, unit.batch, head, sizes.head_dim), first, end, wide);
    if (has_grads) {
      device::copy_tile_async<Tile::queries, V, mma_threads>(
          both_grads + buffer * Tile::queries * device::tile_stride<T, V>,
          matrix(args.grad_output, unit.batch, head, sizes.value_dim), first, end, wide);
    }
    copy_numbers_async(both_normalizers + buffer * Tile::queries, args.normalizer + numbers, first, Tile::queries, end);
    if (wants_scores) {
      copy_numbers_async(both_delta + buffer * Tile::queries, args.delta + numbers, first, Tile::queries, end);
    }
  };
  const auto key = matrix(inputs.key, unit.batch, unit.head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, unit.head, sizes.value_dim);
  device::copy_tile_async<Tile::keys, D, mma_threads>(keys, key, unit.first, num_keys, wide);
  if (has_products) {
    device::copy_tile_async<Tile::keys, V, mma_threads>(values, value, unit.first, num_keys, wide);
  }
  copy_queries(0, begin, 0);
  device::copy_async_commit();

  const int warp = static_cast<int>(threadIdx.x) / device::warp_size;
  const int warp_row = warp / Tile::column_parts * 16 * m;
  const int column_part = warp % Tile::column_parts;
  float bias[m][2], bias_gradient[m][2];
#pragma unroll
  for (int i = 0; i < m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = unit.first + warp_row + device::mma_row(i, half);
      const bool given = inputs.key_bias != nullptr && row < num_keys;
      bias[i][half] = given ? inputs.key_bias[unit.batch * sizes.num_keys + row] : 0.0F;
      bias_gradient[i][half] = 0;
    }
  }
  float key_gradient[m][key_columns / 8][4] = {}, value_gradient[m][value_columns / 8][4] = {};
  int buffer = 0;
  for (int member = 0; member < group_size; ++member) {
    for (int first = begin; first < end; first += Tile::queries, buffer ^= 1) {
      device::copy_async_wait<0>();
      device::syncthreads();  // the queries are there, and those before have been multiplied
      const bool is_last = first + Tile::queries >= end;
      copy_queries(is_last ? member + 1 : member, is_last ? begin : first + Tile::queries, buffer ^ 1);
      device::copy_async_commit();
      const T* queries = both_queries + buffer * Tile::queries * device::tile_stride<T, D>;
      const T* grads = both_grads + buffer * Tile::queries * device::tile_stride<T, V>;
      const Normalizer<float>* normalizers = both_normalizers + buffer * Tile::queries;
      const float* delta = both_delta + buffer * Tile::queries;

      float scores[m][n][4] = {};
      device::multiply_transposed<T, D>(scores, keys + warp_row * device::tile_stride<T, D>, queries);
      device::for_elements(scores, [&](int i, int half, int j, int e) {
        float& score = scores[i][j][2 * half + e];
        score = probability_of(score_of(score, inputs.scale, bias[i][half]), normalizers[device::mma_column(j, e)]);
      });
      hide(scores, visible, warp_row, first, 0.0F);
      if (wants_value) {
        device::multiply_rounded<T, V>(value_gradient, scores, grads + column_part * value_columns);
      }
      if (wants_scores) {
        // A few queries at a time, for want of registers.
#pragma unroll
        for (int part = 0; part < n; part += 2) {
          float products[m][2][4] = {}, gradient[m][2][4];
          const T* part_grads = grads + 8 * part * device::tile_stride<T, V>;
          if (has_products) {
            device::multiply_transposed<T, V>(products, values + warp_row * device::tile_stride<T, V>, part_grads);
          }
          device::for_elements(products, [&](int i, int half, int j, int e) {
            const int at = 2 * half + e;
            const float of_query = delta[device::mma_column(part + j, e)];
            gradient[i][j][at] = score_gradient_of(scores[i][part + j][at], products[i][j][at], of_query);
            bias_gradient[i][half] += gradient[i][j][at];
          });
          if (wants_key) {
            const T* part_queries = queries + 8 * part * device::tile_stride<T, D>;
            device::multiply_rounded<T, D>(key_gradient, gradient, part_queries + column_part * key_columns);
          }
        }
      }
    }
  }

  // Gradients go out by way of the memory of what they are gradients to.
  device::copy_async_wait<0>();
  device::syncthreads();
  device::store_accumulator(keys + warp_row * device::tile_stride<T, D> + column_part * key_columns,
                            device::tile_stride<T, D>, key_gradient, [&](int, int) { return inputs.scale; });
  device::store_accumulator(values + warp_row * device::tile_stride<T, V> + column_part * value_columns,
                            device::tile_stride<T, V>, value_gradient, [](int, int) { return 1.0F; });
  device::syncthreads();
  if (wants_key) {
    device::store_tile<Tile::keys, D, mma_threads>(keys, matrix(args.grad_key, unit.batch, unit.head, sizes.head_dim),
                                                   unit.first, num_keys, wide);
  }
  if (wants_value) {
    device::store_tile<Tile::keys, V, mma_threads>(
        values, matrix(args.grad_value, unit.batch, unit.head, sizes.value_dim), unit.first, num_keys, wide);
  }
  if (args.grad_key_bias != nullptr) {
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = over_lanes_of_row(bias_gradient[i][half], [](float a, float b) { return a + b; });
        const int row = unit.first + warp_row + device::mma_row(i, half);
        if (column_part == 0 && threadIdx.x % 4 == 0 && row < num_keys) {
          args.grad_key_bias[(unit.batch * sizes.num_kv_heads + unit.head) * sizes.num_keys + row] = sum;
        }
      }
    }
  }
}

}  // namespace torchops::kernels::span_attention
