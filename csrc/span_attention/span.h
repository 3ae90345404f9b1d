#pragma once

#include <cstdint>

// Which keys a query sees, the one rule that every kernel goes by. With absolute positions
// p = query_start + i and t = key_start + j, and positions counted in blocks of block_size,
//   floor(p / block_size) - left <= floor(t / block_size) <= floor(p / block_size) + right
// and t <= p where it is causal. Both ends of what a query sees rise with the query, so that the pairs
// form a band: a tile of queries sees keys from the first one's first to the last one's last.

// Kernels are compiled at several instruction sets that must not share a function: these are never called.
#define TORCHOPS_INLINE inline __attribute__((always_inline)) constexpr

namespace torchops::kernels::span_attention {

struct Range {
  int64_t begin;
  int64_t end;

  TORCHOPS_INLINE bool empty() const { return begin >= end; }
  TORCHOPS_INLINE bool contains(int64_t index) const { return begin <= index && index < end; }
  // The part within [first, first + count), counted from `first`.
  TORCHOPS_INLINE Range within(int64_t first, int64_t count) const {
    const int64_t from = begin - first, to = end - first;
    return {from > 0 ? from : 0, to < count ? to : count};
  }
};

struct Span {
  // Positions in a block, and positions that blocks to the left and to the right of a query's own reach
  // over, each at most `unbounded`.
  int64_t block_size;
  int64_t left;
  int64_t right;
  bool is_causal;

  // Longer than any distance between positions, which lie within +-2^58: sums of a few of them fit.
  static constexpr int64_t unbounded = int64_t{1} << 60;
};

// left and right count blocks, -1 lifts the bound.
constexpr Span make_span(int64_t block_size, int64_t left, int64_t right, bool is_causal) {
  const int64_t size = block_size < Span::unbounded ? block_size : Span::unbounded;
  const auto reach = [size](int64_t blocks) {
    return blocks < 0 || blocks > Span::unbounded / size ? Span::unbounded : blocks * size;
  };
  return {size, reach(left), reach(right), is_causal};
}

// The queries and keys of one row of the batch.
struct Sequence {
  int64_t query_start;  // the absolute position of query 0
  int64_t key_start;    // the absolute position of key 0
  int64_t num_queries;
  int64_t num_keys;
};

namespace detail {

TORCHOPS_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// The first position of the block that a position lies in.
TORCHOPS_INLINE int64_t block_start(int64_t position, int64_t block_size) {
  const int64_t remainder = position % block_size;
  return position - (remainder < 0 ? remainder + block_size : remainder);
}

}  // namespace detail

// Positions beyond +-2^57 count as if they lay there.
TORCHOPS_INLINE Sequence make_sequence(int64_t query_start, int64_t key_start, int64_t num_queries, int64_t num_keys) {
  constexpr int64_t limit = int64_t{1} << 57;
  return {detail::clamp(query_start, -limit, limit), detail::clamp(key_start, -limit, limit), num_queries, num_keys};
}

// The keys that a query sees.
TORCHOPS_INLINE Range visible_keys(const Span& span, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.query_start + query;
  const int64_t block = detail::block_start(position, span.block_size);
  int64_t end = block + span.right + span.block_size;
  end = span.is_causal && position + 1 < end ? position + 1 : end;
  return {detail::clamp(block - span.left - sequence.key_start, 0, sequence.num_keys),
          detail::clamp(end - sequence.key_start, 0, sequence.num_keys)};
}

// The queries that see a key.
TORCHOPS_INLINE Range visible_queries(const Span& span, const Sequence& sequence, int64_t key) {
  const int64_t position = sequence.key_start + key;
  const int64_t block = detail::block_start(position, span.block_size);
  int64_t begin = block - span.right;
  begin = span.is_causal && position > begin ? position : begin;
  return {detail::clamp(begin - sequence.query_start, 0, sequence.num_queries),
          detail::clamp(block + span.left + span.block_size - sequence.query_start, 0, sequence.num_queries)};
}

// What some query of [queries.begin, queries.end) sees, and the other way round.
TORCHOPS_INLINE Range visible_keys(const Span& span, const Sequence& sequence, Range queries) {
  return {visible_keys(span, sequence, queries.begin).begin, visible_keys(span, sequence, queries.end - 1).end};
}
TORCHOPS_INLINE Range visible_queries(const Span& span, const Sequence& sequence, Range keys) {
  return {visible_queries(span, sequence, keys.begin).begin, visible_queries(span, sequence, keys.end - 1).end};
}

}  // namespace torchops::kernels::span_attention
