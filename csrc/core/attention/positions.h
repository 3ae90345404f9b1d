#pragma once

#include <cstdint>

// Where the queries and the keys of a row of the batch lie, for the rules of who sees whom.

// Kernels are compiled at several instruction sets that must not share a function: these are never called.
#define TORCHOPS_INLINE inline __attribute__((always_inline)) constexpr

namespace torchops::kernels::attention {

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

// The queries and keys of one row of the batch.
struct Sequence {
  int64_t query_start;  // the absolute position of query 0
  int64_t key_start;    // the absolute position of key 0
  int64_t num_queries;
  int64_t num_keys;
};

// Longer than any distance between positions, which lie within +-2^58: sums of a few of them fit.
inline constexpr int64_t unbounded = int64_t{1} << 60;

TORCHOPS_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Positions beyond +-2^57 count as if they lay there.
TORCHOPS_INLINE Sequence make_sequence(int64_t query_start, int64_t key_start, int64_t num_queries, int64_t num_keys) {
  constexpr int64_t limit = int64_t{1} << 57;
  return {clamp(query_start, -limit, limit), clamp(key_start, -limit, limit), num_queries, num_keys};
}

// Of a row of the batch, whose positions [B] may be null: then the last query lies where the last key does, and key 0
// at 0.
TORCHOPS_INLINE Sequence sequence_of(const int64_t* query_start, const int64_t* key_start, int64_t batch,
                                     int64_t num_queries, int64_t num_keys) {
  return make_sequence(query_start == nullptr ? num_keys - num_queries : query_start[batch],
                       key_start == nullptr ? 0 : key_start[batch], num_queries, num_keys);
}

}  // namespace torchops::kernels::attention
