#pragma once

#include "span_attention/cuda/scores_mma.cuh"
#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

// For queries of at most D elements and values of at most V. A warp has 16 rows of queries, or 32, which halves
// what it reads of keys and values per product.
template <int D, int V>
struct ForwardTile {
  static constexpr int row_blocks = V <= 128 ? 2 : 1;
  static constexpr int queries = mma_warps * 16 * row_blocks;
  static constexpr int keys = V <= 64 ? 64 : D <= 192 ? 48 : 32;

  template <typename T>
  static constexpr size_t shared_bytes =
      device::tile_bytes<T, queries, D> + device::tile_bytes<T, keys, D> + device::tile_bytes<T, keys, V> +
      device::shared_size<float>(keys) + device::shared_size<int2>(queries);
};

// AttentionForward for 16-bit types: a block of mma_threads for each tile of queries, grid [B * Hq * tiles].
// Keys are copied while values are multiplied, and the other way round. Probabilities stay in registers, where a
// lane has of the scores just what it needs to multiply them by values.
template <typename T, int D, int V>
__global__ void __launch_bounds__(mma_threads) forward_mma(AttentionForward<T> args, bool wide) {
  using Tile = ForwardTile<D, V>;
  constexpr int m = Tile::row_blocks, n = Tile::keys / 8;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const HeadTile unit = HeadTile::of_block_from_last(sizes.num_queries, sizes.num_heads, Tile::queries);
  const int kv_head = unit.head / static_cast<int>(sizes.group_size());
  const int num_queries = static_cast<int>(sizes.num_queries);
  device::SharedMemory memory;
  T* queries = memory.take<T>(Tile::queries * device::tile_stride<T, D>);
  T* keys = memory.take<T>(Tile::keys * device::tile_stride<T, D>);
  T* values = memory.take<T>(Tile::keys * device::tile_stride<T, V>);
  float* bias = memory.take<float>(Tile::keys);
  int2* of_row = memory.take<int2>(Tile::queries);
  const VisibleRange visible = visible_range(VisibleKeys{inputs.span, inputs.sequence(unit.batch)}, unit.first,
                                             num_queries, Tile::queries, of_row);
  const int end = visible.end;

  const auto key = matrix(inputs.key, unit.batch, kv_head, sizes.head_dim);
  const auto value = matrix(inputs.value, unit.batch, kv_head, sizes.value_dim);
  const float* key_bias = inputs.key_bias == nullptr ? nullptr : inputs.key_bias + unit.batch * sizes.num_keys;
  const auto copy_keys = [&](int first) {
    if (first < end) {
      device::copy_tile_async<Tile::keys, D, mma_threads>(keys, key, first, end, wide);
    }
    device::copy_async_commit();
  };
  const auto copy_values = [&](int first) {
    device::copy_tile_async<Tile::keys, V, mma_threads>(values, value, first, end, wide);
    if (key_bias != nullptr) {
      copy_numbers_async(bias, key_bias, first, Tile::keys, end);
    }
    device::copy_async_commit();
  };
  device::copy_tile_async<Tile::queries, D, mma_threads>(
      queries, matrix(inputs.query, unit.batch, unit.head, sizes.head_dim), unit.first, num_queries, wide);
  copy_keys(visible.begin);

  const int warp_row = static_cast<int>(threadIdx.x) / device::warp_size * 16 * m;
  float sum[m][V / 8][4] = {};
  OnlineSoftmax<float> softmax[m][2];
  for (int first = visible.begin; first < end; first += Tile::keys) {
    device::copy_async_wait<0>();
    device::syncthreads();  // the keys are there, and the values before have been multiplied
    copy_values(first);
    float scores[m][n][4] = {};
    device::multiply_transposed<T, D>(scores, queries + warp_row * device::tile_stride<T, D>, keys);
    device::copy_async_wait<0>();
    device::syncthreads();  // the values are there, and the keys have been multiplied
    copy_keys(first + Tile::keys);

    device::for_elements(scores, [&](int i, int half, int j, int e) {
      float& score = scores[i][j][2 * half + e];
      score = score_of(score, inputs.scale, key_bias == nullptr ? 0.0F : bias[device::mma_column(j, e)]);
    });
    hide(scores, visible, warp_row, first, minus_infinity<float>);
    float largest[m][2];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      largest[i][0] = largest[i][1] = minus_infinity<float>;
    }
    device::for_elements(scores, [&](int i, int half, int j, int e) {
      largest[i][half] = std::fmax(largest[i][half], scores[i][j][2 * half + e]);
    });
#pragma unroll
    for (int i = 0; i < m; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = softmax[i][half].raise(
            over_lanes_of_row(largest[i][half], [](float a, float b) { return std::fmax(a, b); }));
#pragma unroll
        for (int j = 0; j < V / 8; ++j) {
          sum[i][j][2 * half] *= factor;
          sum[i][j][2 * half + 1] *= factor;
        }
      }
    }
    device::for_elements(scores, [&](int i, int half, int j, int e) {
      float& score = scores[i][j][2 * half + e];
      score = exponential(score - softmax[i][half].reference());
      softmax[i][half].sum += score;
    });
    device::multiply_rounded<T, V>(sum, scores, values);
  }

  float factors[m][2];
#pragma unroll
  for (int i = 0; i < m; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      OnlineSoftmax<float>& row_softmax = softmax[i][half];
      row_softmax.sum = over_lanes_of_row(row_softmax.sum, [](float a, float b) { return a + b; });
      factors[i][half] = row_softmax.finish(inputs.sink == nullptr ? nullptr : inputs.sink + unit.head);
      const int row = unit.first + warp_row + device::mma_row(i, half);
      if (threadIdx.x % 4 == 0 && row < num_queries) {
        store_softmax(args, row_softmax, (unit.batch * sizes.num_heads + unit.head) * sizes.num_queries + row);
      }
    }
  }
  // The queries' memory has room for the output, whose rows are not longer.
  static_assert(V <= D);
  device::copy_async_wait<0>();
  device::syncthreads();
  device::store_accumulator(queries + warp_row * device::tile_stride<T, V>, device::tile_stride<T, V>, sum,
                            [&](int i, int half) { return factors[i][half]; });
  device::syncthreads();
  device::store_tile<Tile::queries, V, mma_threads>(
      queries, matrix(args.output, unit.batch, unit.head, sizes.value_dim), unit.first, num_queries, wide);
}

}  // namespace torchops::kernels::span_attention
