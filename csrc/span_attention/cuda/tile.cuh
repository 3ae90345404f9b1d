#pragma once

#include "core/attention/cuda/softmax.cuh"
#include "core/cuda/copy_tile.cuh"
#include "span_attention/attention.h"

// What a block works on: a tile of queries of one head and the keys that they see, or the other way round.

namespace torchops::kernels::span_attention {

// Blocks are numbered tile by tile, head by head, row of the batch by row of the batch. Lengths are below 2^31.
struct HeadTile {
  int batch;
  int head;
  int first;  // row of the tile

  __device__ static HeadTile of_block(int64_t length, int64_t num_heads, int tile) {
    const unsigned tiles = static_cast<unsigned>((length + tile - 1) / tile);
    const unsigned unit = blockIdx.x / tiles, heads = static_cast<unsigned>(num_heads);
    return {static_cast<int>(unit / heads), static_cast<int>(unit % heads),
            static_cast<int>(blockIdx.x % tiles) * tile};
  }

  // With the last tile of a head first: under a causal span it has the most work.
  __device__ static HeadTile of_block_from_last(int64_t length, int64_t num_heads, int tile) {
    HeadTile result = of_block(length, num_heads, tile);
    result.first = static_cast<int>((length - 1) / tile) * tile - result.first;
    return result;
  }
};

template <typename T>
__device__ __forceinline__ device::MatrixRows<T> matrix(const Heads<T>& heads, int64_t batch, int64_t head,
                                                        int64_t size) {
  return {heads.row(batch, head, 0), heads.row_stride, static_cast<int>(size)};
}

struct VisibleKeys {
  Span span;
  Sequence sequence;
  __device__ Range operator()(int query) const { return visible_keys(span, sequence, int64_t{query}); }
};
struct VisibleQueries {
  Span span;
  Sequence sequence;
  __device__ Range operator()(int key) const { return visible_queries(span, sequence, int64_t{key}); }
};

// What the rows of a tile see of the other side.
struct VisibleRange {
  int begin, end;          // at least one row
  int all_begin, all_end;  // every row
  int2* of_row;            // each row, in shared memory; nothing for rows behind the last

  // Whether some row does not see all of [first, first + count).
  __device__ __forceinline__ bool is_edge(int first, int count) const {
    return first < all_begin || all_end - first < count;
  }

  // What a row sees of a tile [first, first + count), given whether that is an edge.
  __device__ __forceinline__ int2 seen_by(int row, bool edge, int first, int count) const {
    return edge ? of_row[row] : make_int2(first, first + count);
  }
};

// of_row [tile] can be read behind the next barrier.
template <typename Visible>
__device__ VisibleRange visible_range(const Visible& visible, int first, int length, int tile, int2* of_row) {
  for (int row = static_cast<int>(threadIdx.x); row < tile; row += static_cast<int>(blockDim.x)) {
    const Range range = first + row < length ? visible(first + row) : Range{0, 0};
    of_row[row] = make_int2(static_cast<int>(range.begin), static_cast<int>(range.end));
  }
  // Both ends of what a row sees rise with the row.
  const Range front = visible(first);
  const Range back = visible((first + tile < length ? first + tile : length) - 1);
  return {static_cast<int>(front.begin), static_cast<int>(back.end), static_cast<int>(back.begin),
          static_cast<int>(front.end), of_row};
}

// Starts to copy numbers [first, first + count) of a vector into shared memory; 0 stands for those from `end` on.
template <typename A>
__device__ __forceinline__ void copy_numbers_async(A* to, const A* from, int first, int count, int end) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    device::copy_async<static_cast<int>(sizeof(A))>(to + i, from + first + i, i < end - first);
  }
}

}  // namespace torchops::kernels::span_attention
