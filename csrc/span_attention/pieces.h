#pragma once

#include "span_attention/attention.h"

// Pieces of the keys that few queries see, for which separate units compute results that are merged afterwards. How
// many there are depends on sizes and the span alone, never on data or threads: so results keep their bits.

namespace torchops::kernels::span_attention {

// Rows that share the keys of a key-value head: its queries, head of the group by head of the group.
TORCHOPS_INLINE int64_t rows_of(const Sizes& sizes) {
  return sizes.group_size() * sizes.num_queries;
}

// No more keys than that are seen by the queries of a row of the batch, wherever they lie.
TORCHOPS_INLINE int64_t most_visible_keys(const Sizes& sizes, const Span& span) {
  const int64_t right = span.is_causal ? 0 : span.right;
  const int64_t between = sizes.num_queries <= 1 ? 0 : sizes.num_queries + span.block_size;
  const int64_t seen = span.left + span.block_size + right + between;
  return seen < sizes.num_keys ? seen : sizes.num_keys;
}

// As many pieces as bring `units` units to `most_units`, but none of fewer than least_piece keys.
TORCHOPS_INLINE int64_t num_pieces(const Sizes& sizes, const Span& span, int64_t least_piece, int64_t units,
                                   int64_t most_units) {
  const int64_t of_keys = (most_visible_keys(sizes, span) + least_piece - 1) / least_piece;
  const int64_t of_units = units == 0 ? 1 : (most_units + units - 1) / units;
  const int64_t pieces = of_keys < of_units ? of_keys : of_units;
  return pieces < 1 ? 1 : pieces;
}

// A piece's share of the keys that are seen, whole blocks of them but for the last. Where fewer are seen than there
// might be, the last pieces are empty.
TORCHOPS_INLINE Range keys_of_piece(Range keys, int64_t piece, int64_t pieces, int64_t block) {
  const int64_t count = keys.empty() ? 0 : keys.end - keys.begin;
  const int64_t blocks = (count + block - 1) / block;
  const int64_t length = (blocks + pieces - 1) / pieces * block;
  const int64_t begin = keys.begin + piece * length;
  return {begin, begin + length < keys.end ? begin + length : keys.end};
}

}  // namespace torchops::kernels::span_attention
