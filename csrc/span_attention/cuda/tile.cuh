#pragma once

#include <cmath>
#include <limits>

#include "core/cuda/copy_tile.cuh"
#include "span_attention/attention.h"

// What a block works on: a tile of queries of one head and the keys that they see, or the other way round.

namespace torchops::kernels::span_attention {

// log2(e): scores are brought to base 2, where the device has an instruction for powers.
template <typename A>
inline constexpr A log2_e = A(1.4426950408889634074);
template <typename A>
inline constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

inline int64_t tiles_of(int64_t length, int64_t tile) {
  return (length + tile - 1) / tile;
}

// Blocks are numbered tile by tile, head by head, row of the batch by row of the batch.
struct HeadTile {
  int64_t batch;
  int64_t head;
  int64_t first;  // row of the tile

  __device__ static HeadTile of_block(int64_t length, int64_t num_heads, int tile) {
    const unsigned tiles = static_cast<unsigned>((length + tile - 1) / tile);
    const unsigned unit = blockIdx.x / tiles;
    const unsigned heads = static_cast<unsigned>(num_heads);
    return {unit / heads, unit % heads, int64_t{blockIdx.x % tiles} * tile};
  }

  // With the last tile of a head first: under a causal span it has the most work.
  __device__ static HeadTile of_block_from_last(int64_t length, int64_t num_heads, int tile) {
    HeadTile result = of_block(length, num_heads, tile);
    result.first = (length - 1) / tile * tile - result.first;
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
  __device__ Range operator()(int64_t query) const { return visible_keys(span, sequence, query); }
};
struct VisibleQueries {
  Span span;
  Sequence sequence;
  __device__ Range operator()(int64_t key) const { return visible_queries(span, sequence, key); }
};

// What the rows of a tile see of the other side.
struct VisibleRange {
  Range any;      // at least one row
  Range all;      // every row
  Range* of_row;  // each row, in shared memory; nothing for rows behind the last

  // Whether some row does not see all of [first, first + count).
  __device__ bool is_edge(int64_t first, int count) const { return first < all.begin || first + count > all.end; }

  // The part of [first, first + count) that a row sees, counted from first.
  __device__ int2 within(int row, int64_t first, int count) const {
    const Range range = of_row[row];
    return make_int2(static_cast<int>(detail::clamp(range.begin - first, 0, count)),
                     static_cast<int>(detail::clamp(range.end - first, 0, count)));
  }
};

// of_row [tile] can be read behind the next barrier.
template <typename Visible>
__device__ VisibleRange visible_range(const Visible& visible, int64_t first, int64_t length, int tile, Range* of_row) {
  for (int row = static_cast<int>(threadIdx.x); row < tile; row += static_cast<int>(blockDim.x)) {
    of_row[row] = first + row < length ? visible(first + row) : Range{0, 0};
  }
  // Both ends of what a row sees rise with the row.
  const Range front = visible(first);
  const Range back = visible((first + tile < length ? first + tile : length) - 1);
  return {{front.begin, back.end}, {back.begin, front.end}, of_row};
}

// Starts to copy numbers [first, first + count) of a vector into shared memory; those outside of [begin, end) are 0.
template <typename A>
__device__ __forceinline__ void copy_numbers_async(A* to, const A* from, int64_t first, int count, int64_t begin,
                                                   int64_t end) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const bool valid = begin <= first + i && first + i < end;
    device::copy_async<static_cast<int>(sizeof(A))>(to + i, from + first + i, valid);
  }
}

// A logsumexp in base 2, such that every probability of a query that sees no key is 0.
template <typename A>
__device__ __forceinline__ A log2_sum(A logsumexp) {
  return logsumexp == minus_infinity<A> ? std::numeric_limits<A>::infinity() : logsumexp * log2_e<A>;
}

}  // namespace torchops::kernels::span_attention
