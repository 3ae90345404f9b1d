#pragma once

#include "span_attention/cuda/scores_mma.cuh"

namespace torchops::kernels::span_attention {

// For queries of at most D elements and values of at most V.
template <int D, int V>
struct QueryGradientTile {
  static constexpr int row_blocks = D <= 128 ? 2 : 1;
  static constexpr int queries = mma_warps * 16 * row_blocks;
  static constexpr int keys = D <= 192 ? 32 : 16;

  template <typename T>
  static constexpr size_t shared_bytes =
      device::tile_bytes<T, queries, D> + device::tile_bytes<T, queries, V> + 2 * device::tile_bytes<T, keys, D> +
      device::tile_bytes<T, keys, V> + device::shared_size<float>(2 * keys) +
      device::shared_size<Normalizer<float>>(queries) + device::shared_size<float>(queries) +
      device::shared_size<int2>(queries);
};

// AttentionBackward's grad_query for 16-bit types: a block of mma_threads for each tile of queries, grid
// [B * Hq * tiles]. Keys, which are multiplied twice, have two buffers.
template <typename T, int D, int V>
__global__ void __launch_bounds__(mma_threads, 1) query_gradient_mma(AttentionBackward<T> args, bool wide) {
  using Tile = QueryGradientTile<D, V>;
  constexpr int m = Tile::row_blocks, n = Tile::keys / 8;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const HeadTile unit = HeadTile::of_block_from_last(sizes.num_queries, sizes.num_heads, Tile::queries);
  const int kv_head = unit.head / static_cast<int>(sizes.group_size());
  const int num_queries = static_cast<int>(sizes.num_queries);
  device::SharedMemory memory;
  T* queries = memory.take<T>(Tile::queries * device::tile_stride<T, D>);
  T* grads = memory.take<T>(Tile::queries * device::tile_stride<T, V>);
  T* both_keys = memory.take<T>(2 * Tile::keys * device::tile_stride<T, D>);
  T* values = memory.take<T>(Tile::keys * device::tile_stride<T, V>);
  float* both_bias = memory.take<float>(2 * Tile::keys);
  auto* of_rows = memory.take<Normalizer<float>>(Tile::queries);
  float* delta = memory.take<float>(Tile::queries);
  int2* of_row = memory.take<int2>(Tile::queries);
  const VisibleRange visible = visible_range(VisibleKeys{inputs.span, inputs.sequence(unit.batch)}, unit.first,
                                             num_queries, Tile::queries, of_row);
  const int end = visible.end;
  const bool has_products = sizes.value_dim > 0;

  const auto key = matrix(inputs.key, unit.batch, kv_head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, kv_head, sizes.value_dim);
  const float* key_bias = inputs.key_bias == nullptr ? nullptr : inputs.key_bias + unit.batch * sizes.num_keys;
  const auto copy_keys = [&](int first, int buffer) {
    if (first < end) {
      device::copy_tile_async<Tile::keys, D, mma_threads>(both_keys + buffer * Tile::keys * device::tile_stride<T, D>,
                                                          key, first, end, wide);
      if (key_bias != nullptr) {
        copy_numbers_async(both_bias + buffer * Tile::keys, key_bias, first, Tile::keys, end);
      }
    }
    device::copy_async_commit();
  };
  const auto copy_values = [&](int first) {
    if (has_products && first < end) {
      device::copy_tile_async<Tile::keys, V, mma_threads>(values, value, first, end, wide);
    }
    device::copy_async_commit();
  };
  device::copy_tile_async<Tile::queries, D, mma_threads>(
      queries, matrix(inputs.query, unit.batch, unit.head, sizes.head_dim), unit.first, num_queries, wide);
  if (has_products) {
    device::copy_tile_async<Tile::queries, V, mma_threads>(
        grads, matrix(args.grad_output, unit.batch, unit.head, sizes.value_dim), unit.first, num_queries, wide);
  }
  copy_keys(visible.begin, 0);
  copy_values(visible.begin);

  const int warp_row = static_cast<int>(threadIdx.x) / device::warp_size * 16 * m;
  // In shared memory for want of registers.
  for (int row = static_cast<int>(threadIdx.x); row < Tile::queries; row += mma_threads) {
    const int64_t index = (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + unit.first + row;
    const bool valid = unit.first + row < num_queries;
    of_rows[row] = valid ? args.normalizer[index] : make_normalizer(0.0F, 0.0F);
    delta[row] = valid ? args.delta[index] : 0.0F;
  }
  float gradient[m][D / 8][4] = {};
  int buffer = 0;
  for (int first = visible.begin; first < end; first += Tile::keys, buffer ^= 1) {
    device::copy_async_wait<0>();
    device::syncthreads();  // keys and values are there, and the keys before have been multiplied
    copy_keys(first + Tile::keys, buffer ^ 1);
    const T* keys = both_keys + buffer * Tile::keys * device::tile_stride<T, D>;
    const float* bias = both_bias + buffer * Tile::keys;
    float scores[m][n][4] = {};
    device::multiply_transposed<T, D>(scores, queries + warp_row * device::tile_stride<T, D>, keys);
    Normalizer<float> normalizers[m][2];
    float deltas[m][2];
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        normalizers[i][half] = of_rows[warp_row + device::mma_row(i, half)];
        deltas[i][half] = delta[warp_row + device::mma_row(i, half)];
      }
    }
    device::for_elements(scores, [&](int i, int half, int j, int e) {
      float& score = scores[i][j][2 * half + e];
      const float of_key = key_bias == nullptr ? 0.0F : bias[device::mma_column(j, e)];
      score = probability_of(score_of(score, inputs.scale, of_key), normalizers[i][half]);
    });
    hide(scores, visible, warp_row, first, 0.0F);
    float products[m][n][4] = {};
    if (has_products) {
      device::multiply_transposed<T, V>(products, grads + warp_row * device::tile_stride<T, V>, values);
    }
    device::for_elements(scores, [&](int i, int half, int j, int e) {
      float& score = scores[i][j][2 * half + e];
      score = score_gradient_of(score, products[i][j][2 * half + e], deltas[i][half]);
    });
    device::syncthreads();  // the values have been multiplied
    copy_values(first + Tile::keys);
    device::multiply_rounded<T, D>(gradient, scores, keys);
  }

  device::copy_async_wait<0>();
  device::syncthreads();
  device::store_accumulator(queries + warp_row * device::tile_stride<T, D>, device::tile_stride<T, D>, gradient,
                            [&](int, int) { return inputs.scale; });
  device::syncthreads();
  device::store_tile<Tile::queries, D, mma_threads>(
      queries, matrix(args.grad_query, unit.batch, unit.head, sizes.head_dim), unit.first, num_queries, wide);
}

}  // namespace torchops::kernels::span_attention
