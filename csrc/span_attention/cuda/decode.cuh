#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/pack.cuh"
#include "span_attention/cuda/launches.h"
#include "span_attention/cuda/tile.cuh"

// The forward of few queries and many keys, without a backward: the keys of a head are cut into pieces, which blocks
// compute by themselves, and a second kernel merges what they give. Keys and values are read once, by all queries of
// all heads that share them; products are the smaller part of the work, so they take no matrix units.

namespace torchops::kernels::span_attention {

inline constexpr int decode_threads = 128;
inline constexpr int decode_warps = decode_threads / device::warp_size;
// Neighbouring threads that share a key.
inline constexpr int decode_side = 8;

template <typename A, int rows>
inline constexpr size_t decode_shared_bytes =
    device::shared_size<A>(rows * 256) + device::shared_size<A>(rows * decode_block) + device::shared_size<A>(rows) +
    device::shared_size<int2>(rows) + device::shared_size<A>(decode_threads * rows);

// Neighbours in memory, read at once where they are aligned to that: how they lie must not change what is added to
// what.
template <int width, typename T>
__device__ __forceinline__ device::Pack<T, width> load_neighbours(const T* from, bool aligned) {
  if (aligned) {
    return device::load_pack<width>(from);
  }
  device::Pack<T, width> pack;
#pragma unroll
  for (int e = 0; e < width; ++e) {
    pack.element[e] = from[e];
  }
  return pack;
}

// The scores of a block of keys, of which the first `count` are there: a key to each eight threads of the block.
template <int width, int rows, typename T, typename A>
__device__ __forceinline__ void decode_scores(A* scores, const A* queries, const device::MatrixRows<const T>& key,
                                              bool aligned, int first, int count, A scale, const A* bias,
                                              const int2* of_row) {
  const int side = static_cast<int>(threadIdx.x) % decode_side;
  for (int j = static_cast<int>(threadIdx.x) / decode_side; j < decode_block; j += decode_threads / decode_side) {
    A sum[rows] = {};
    if (j < count) {
      const T* from = key.data + (first + j) * key.row_stride;
      for (int d = side * width; d < key.size; d += decode_side * width) {
        const auto pack = load_neighbours<width>(from + d, aligned);
#pragma unroll
        for (int e = 0; e < width; ++e) {
#pragma unroll
          for (int row = 0; row < rows; ++row) {
            sum[row] += queries[row * key.size + d + e] * device::widen(pack.element[e]);
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int bits = decode_side / 2; bits > 0; bits /= 2) {
        sum[row] += device::shuffle_xor(sum[row], bits);
      }
      const int2 seen = of_row[row];
      if (side == row % decode_side) {
        scores[row * decode_block + j] = j < count && seen.x <= first + j && first + j < seen.y
                                             ? score_of(sum[row], scale, bias == nullptr ? A(0) : bias[first + j])
                                             : minus_infinity<A>;
      }
    }
  }
}

// Of Attention, a piece of the keys. A block for each, grid [B * Hkv * row tiles * pieces]. `width` divides D and Dv;
// `aligned` says whether all keys and values are aligned to so many elements.
template <typename T, int width, int rows>
__global__ void __launch_bounds__(decode_threads, 1)
    decode_piece(Attention<T> args, DecodePartials<accumulate_t<T>> partials, bool aligned) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  const int pieces = static_cast<int>(partials.pieces), num_rows = static_cast<int>(rows_of(sizes));
  const int row_tiles = (num_rows + rows - 1) / rows, num_queries = static_cast<int>(sizes.num_queries);
  const int piece = static_cast<int>(blockIdx.x) % pieces, unit = static_cast<int>(blockIdx.x) / pieces;
  const int first_row = unit % row_tiles * rows, head = unit / row_tiles;  // b * Hkv + head
  const int batch = head / static_cast<int>(sizes.num_kv_heads), kv_head = head % static_cast<int>(sizes.num_kv_heads);
  const int head_dim = static_cast<int>(sizes.head_dim), value_dim = static_cast<int>(sizes.value_dim);
  const VisibleKeys visible{args.span, args.sequence(batch)};
  const Range keys =
      keys_of_piece(visible_keys(visible.span, visible.sequence, Range{0, num_queries}), piece, pieces, decode_block);
  device::SharedMemory memory;
  A* queries = memory.take<A>(rows * 256);          // [rows][D]
  A* scores = memory.take<A>(rows * decode_block);  // then exp(score - largest)
  A* factors = memory.take<A>(rows);                // what was summed up before is to be multiplied by
  int2* of_row = memory.take<int2>(rows);
  A* shares = memory.take<A>(decode_threads * rows);

  for (int i = static_cast<int>(threadIdx.x); i < rows * head_dim; i += decode_threads) {
    const int row = first_row + i / head_dim;
    queries[i] = row < num_rows ? device::widen(args.query.row(batch, kv_head * sizes.group_size() + row / num_queries,
                                                               row % num_queries)[i % head_dim])
                                : A(0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < rows; i += decode_threads) {
    const Range seen = first_row + i < num_rows ? visible((first_row + i) % num_queries) : Range{0, 0};
    of_row[i] = make_int2(static_cast<int>(seen.begin), static_cast<int>(seen.end));
  }
  device::syncthreads();  // the queries are there

  const auto key = matrix(args.key, batch, kv_head, head_dim);
  const auto value = matrix(args.value, batch, kv_head, value_dim);
  const A* bias = args.key_bias == nullptr ? nullptr : args.key_bias + batch * sizes.num_keys;
  // A thread has one or two packs of columns, of every so many keys.
  constexpr int packs = width == 1 ? 2 : 1;
  int columns = 1;  // threads side by side
  while (columns < decode_threads && columns * width * packs < value_dim) {
    columns *= 2;
  }
  const int own_column = static_cast<int>(threadIdx.x) % columns * width;
  const int own_key = static_cast<int>(threadIdx.x) / columns, keys_apart = decode_threads / columns;
  A sums[packs][rows][width] = {};
  OnlineSoftmax<A> softmax[(rows + decode_warps - 1) / decode_warps];  // of rows warp, warp + decode_warps, ...
  const int end = static_cast<int>(keys.end);
  for (int first = static_cast<int>(keys.begin); first < end; first += decode_block) {
    const int count = end - first < decode_block ? end - first : decode_block;
    decode_scores<width, rows>(scores, queries, key, aligned, first, count, args.scale, bias, of_row);
    device::syncthreads();  // the scores are there
#pragma unroll
    for (int i = 0; i < (rows + decode_warps - 1) / decode_warps; ++i) {
      const int row = device::warp_index() + i * decode_warps;
      if (row < rows) {
        A* own = scores + row * decode_block + device::lane_index();
        A largest = device::max(own[0], own[device::warp_size]);
        for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
          largest = device::max(largest, device::shuffle_xor(largest, bits));
        }
        const A factor = softmax[i].raise(largest);
#pragma unroll
        for (int j = 0; j < decode_block; j += device::warp_size) {
          own[j] = exponential(own[j] - softmax[i].reference());
          softmax[i].sum += own[j];
        }
        if (device::lane_index() == 0) {
          factors[row] = factor;
        }
      }
    }
    device::syncthreads();  // the weights are there
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int p = 0; p < packs; ++p) {
#pragma unroll
        for (int e = 0; e < width; ++e) {
          sums[p][row][e] *= factors[row];
        }
      }
    }
    for (int j = own_key; j < count; j += keys_apart) {
      const T* from = value.data + (first + j) * value.row_stride;
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        const int column = own_column + p * columns * width;
        if (column < value_dim) {
          const auto pack = load_neighbours<width>(from + column, aligned);
#pragma unroll
          for (int row = 0; row < rows; ++row) {
#pragma unroll
            for (int e = 0; e < width; ++e) {
              sums[p][row][e] += scores[row * decode_block + j] * device::widen(pack.element[e]);
            }
          }
        }
      }
    }
    device::syncthreads();  // the weights have been multiplied
  }

  const int64_t first_result = (int64_t{head} * num_rows + first_row) * pieces + piece;
#pragma unroll
  for (int i = 0; i < (rows + decode_warps - 1) / decode_warps; ++i) {
    const int row = device::warp_index() + i * decode_warps;
    const A sum = device::sum_of_warp(softmax[i].sum);
    if (device::lane_index() == 0 && row < rows && first_row + row < num_rows) {
      A* to = partials.softmax + 2 * (first_result + int64_t{row} * pieces);
      to[0] = softmax[i].largest;
      to[1] = sum;
    }
  }
  // Threads that had the same columns of other keys add up what they have, column by column.
#pragma unroll
  for (int p = 0; p < packs; ++p) {
#pragma unroll
    for (int e = 0; e < width; ++e) {
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        shares[row * decode_threads + static_cast<int>(threadIdx.x)] = sums[p][row][e];
      }
      device::syncthreads();  // the shares are there
      for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += decode_threads) {
        const int row = i / columns, column = (i % columns + p * columns) * width + e;
        if (first_row + row < num_rows && column < value_dim) {
          A sum = 0;
          for (int of = 0; of < keys_apart; ++of) {
            sum += shares[row * decode_threads + of * columns + i % columns];
          }
          partials.output[(first_result + int64_t{row} * pieces) * value_dim + column] = sum;
        }
      }
      device::syncthreads();  // the shares have been added up
    }
  }
}

// Merges the pieces of a row, in ascending order; a block for each row of the output, grid [B * Hq * Lq].
template <typename T>
__global__ void __launch_bounds__(decode_threads)
    decode_merge(AttentionForward<T> args, DecodePartials<accumulate_t<T>> partials) {
  using A = accumulate_t<T>;
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const int num_queries = static_cast<int>(sizes.num_queries), num_heads = static_cast<int>(sizes.num_heads);
  const int row = static_cast<int>(blockIdx.x);
  const int query = row % num_queries, head = row / num_queries % num_heads, batch = row / num_queries / num_heads;
  const Range keys = visible_keys(inputs.span, inputs.sequence(batch), Range{0, num_queries});
  const A* of_pieces = partials.softmax + 2 * (row * partials.pieces);
  int used = 0;
  OnlineSoftmax<A> softmax;
  for (; used < partials.pieces && !keys_of_piece(keys, used, partials.pieces, decode_block).empty(); ++used) {
    softmax.largest = device::max(softmax.largest, of_pieces[2 * used]);
  }
  for (int piece = 0; piece < used; ++piece) {
    softmax.sum += of_pieces[2 * piece + 1] * exponential(of_pieces[2 * piece] - softmax.reference());
  }
  const A reference = softmax.reference();
  const A factor = softmax.finish(inputs.sink == nullptr ? nullptr : inputs.sink + head);
  if (threadIdx.x == 0) {
    store_softmax(args, softmax, row);
  }
  T* to = args.output.row(batch, head, query);
  const int value_dim = static_cast<int>(sizes.value_dim);
  for (int column = static_cast<int>(threadIdx.x); column < value_dim; column += decode_threads) {
    const A* from = partials.output + row * partials.pieces * value_dim + column;
    A sum = 0;
    for (int piece = 0; piece < used; ++piece) {
      sum += from[piece * value_dim] * exponential(of_pieces[2 * piece] - reference);
    }
    to[column] = device::narrow<T>(sum * factor);
  }
}

}  // namespace torchops::kernels::span_attention
