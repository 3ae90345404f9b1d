#pragma once

#include "span_attention/cuda/scores_mma.cuh"

namespace torchops::kernels::span_attention {

// For queries of at most D elements and values of at most V.
template <int D, int V>
struct QueryGradientTile {
  static constexpr int row_blocks = D <= 128 ? 2 : 1;
  static constexpr int queries = mma_warps * 16 * row_blocks;
  static constexpr int keys = D <= 64 ? 64 : D <= 192 ? 32 : 16;

  template <typename T>
  static constexpr size_t shared_bytes =
      device::tile_bytes<T, queries, D> + device::tile_bytes<T, queries, V> + 2 * device::tile_bytes<T, keys, D> +
      device::tile_bytes<T, keys, V> + 2 * device::shared_size<float>(keys) + device::shared_size<int2>(queries);
};

// AttentionBackward's grad_query for 16-bit types: a block of mma_threads for each tile of queries, grid
// [B * Hq * tiles]. Keys, which are multiplied twice, have two buffers.
template <typename T, int D, int V>
__global__ void __launch_bounds__(mma_threads) query_gradient_mma(AttentionBackward<T> args, bool wide) {
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
  T* even_keys = memory.take<T>(Tile::keys * device::tile_stride<T, D>);
  T* odd_keys = memory.take<T>(Tile::keys * device::tile_stride<T, D>);
  T* values = memory.take<T>(Tile::keys * device::tile_stride<T, V>);
  float* even_bias = memory.take<float>(Tile::keys);
  float* odd_bias = memory.take<float>(Tile::keys);
  int2* of_row = memory.take<int2>(Tile::queries);
  const VisibleRange visible = visible_range(VisibleKeys{inputs.span, inputs.sequence(unit.batch)}, unit.first,
                                             num_queries, Tile::queries, of_row);
  const int end = visible.end;

  const auto key = matrix(inputs.key, unit.batch, kv_head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, kv_head, sizes.value_dim);
  const float* key_bias = inputs.key_bias == nullptr ? nullptr : inputs.key_bias + unit.batch * sizes.num_keys;
  const auto copy_keys = [&](int first, bool odd) {
    if (first < end) {
      device::copy_tile_async<Tile::keys, D, mma_threads>(odd ? odd_keys : even_keys, key, first, end, wide);
      if (key_bias != nullptr) {
        copy_numbers_async(odd ? odd_bias : even_bias, key_bias, first, Tile::keys, end);
      }
    }
    device::copy_async_commit();
  };
  const auto copy_values = [&](int first) {
    if (first < end) {
      device::copy_tile_async<Tile::keys, V, mma_threads>(values, value, first, end, wide);
    }
    device::copy_async_commit();
  };
  device::copy_tile_async<Tile::queries, D, mma_threads>(
      queries, matrix(inputs.query, unit.batch, unit.head, sizes.head_dim), unit.first, num_queries, wide);
  device::copy_tile_async<Tile::queries, V, mma_threads>(
      grads, matrix(args.grad_output, unit.batch, unit.head, sizes.value_dim), unit.first, num_queries, wide);
  copy_keys(visible.begin, false);
  copy_values(visible.begin);

  const int warp_row = static_cast<int>(threadIdx.x) / device::warp_size * 16 * m;
  const float scale = inputs.scale * log2_e<float>;
  float log2_sums[m][2], delta[m][2];
#pragma unroll
  for (int i = 0; i < m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = unit.first + warp_row + device::mma_row(i, half);
      const int64_t index = (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row;
      const bool valid = row < num_queries;
      log2_sums[i][half] = log2_sum(valid ? args.logsumexp[index] : minus_infinity<float>);
      delta[i][half] = valid ? args.delta[index] : 0.0F;
    }
  }
  float gradient[m][D / 8][4] = {};
  bool odd = false;
  for (int first = visible.begin; first < end; first += Tile::keys, odd = !odd) {
    device::copy_async_wait<0>();
    device::syncthreads();  // keys and values are there, and the keys before have been multiplied
    copy_keys(first + Tile::keys, !odd);
    const T* keys = odd ? odd_keys : even_keys;
    const float* bias = odd ? odd_bias : even_bias;
    float scores[m][n][4] = {}, products[m][n][4] = {};
    device::multiply_transposed<T, D>(scores, queries + warp_row * device::tile_stride<T, D>, keys);
    device::multiply_transposed<T, V>(products, grads + warp_row * device::tile_stride<T, V>, values);
    device::syncthreads();  // the values have been multiplied
    copy_values(first + Tile::keys);

    for_elements(scores, [&](int i, int half, float& score, int column) {
      score = device::fast_exp2(score * scale +
                                (key_bias == nullptr ? 0.0F : bias[column] * log2_e<float>)-log2_sums[i][half]);
    });
    hide(scores, visible, warp_row, first, 0.0F);
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[i][j][e] *= products[i][j][e] - delta[i][e / 2];
        }
      }
    }
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
