#pragma once

#include <cstdint>

#include "core/attention/positions.h"

// Which keys a query sees, the one rule that every kernel goes by. With absolute positions
// p = query_start + i and t = key_start + j, and positions counted in blocks of block_size,
//   floor(p / block_size) - left <= floor(t / block_size) <= floor(p / block_size) + right
// and t <= p where it is causal. Both ends of what a query sees rise with the query, so that the pairs
// form a band: a tile of queries sees keys from the first one's first to the last one's last.

namespace torchops::kernels::span_attention {

using namespace attention;

struct Span {
  // Positions in a block, and positions that blocks to the left and to the right of a query's own reach
  // over, each at most `unbounded`.
  int64_t block_size;
  int64_t left;
  int64_t right;
  bool is_causal;
};

// left and right count blocks, -1 lifts the bound.
constexpr Span make_span(int64_t block_size, int64_t left, int64_t right, bool is_causal) {
  const int64_t size = block_size < unbounded ? block_size : unbounded;
  const auto reach = [size](int64_t blocks) {
    return blocks < 0 || blocks > unbounded / size ? unbounded : blocks * size;
  };
  return {size, reach(left), reach(right), is_causal};
}

// The first position of the block that a position lies in.
TORCHOPS_INLINE int64_t block_start(int64_t position, int64_t block_size) {
  const int64_t remainder = position % block_size;
  return position - (remainder < 0 ? remainder + block_size : remainder);
}

// The keys that a query sees.
TORCHOPS_INLINE Range visible_keys(const Span& span, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.query_start + query;
  const int64_t block = block_start(position, span.block_size);
  int64_t end = block + span.right + span.block_size;
  end = span.is_causal && position + 1 < end ? position + 1 : end;
  return {clamp(block - span.left - sequence.key_start, 0, sequence.num_keys),
          clamp(end - sequence.key_start, 0, sequence.num_keys)};
}

// The queries that see a key.
TORCHOPS_INLINE Range visible_queries(const Span& span, const Sequence& sequence, int64_t key) {
  const int64_t position = sequence.key_start + key;
  const int64_t block = block_start(position, span.block_size);
  int64_t begin = block - span.right;
  begin = span.is_causal && position > begin ? position : begin;
  return {clamp(begin - sequence.query_start, 0, sequence.num_queries),
          clamp(block + span.left + span.block_size - sequence.query_start, 0, sequence.num_queries)};
}

// What some query of [queries.begin, queries.end) sees, and the other way round.
TORCHOPS_INLINE Range visible_keys(const Span& span, const Sequence& sequence, Range queries) {
  return {visible_keys(span, sequence, queries.begin).begin, visible_keys(span, sequence, queries.end - 1).end};
}
TORCHOPS_INLINE Range visible_queries(const Span& span, const Sequence& sequence, Range keys) {
  return {visible_queries(span, sequence, keys.begin).begin, visible_queries(span, sequence, keys.end - 1).end};
}

}  // namespace torchops::kernels::span_attention
