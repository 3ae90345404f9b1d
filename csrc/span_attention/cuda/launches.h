#pragma once

#include "core/cuda/tiles.h"
#include "span_attention/attention.h"
#include "span_attention/pieces.h"

// What the host layer has to know of the kernels, and how it starts them.

namespace torchops::kernels::span_attention {

template <typename T>
void launch_forward(const AttentionForward<T>& args);

// Keys whose scores are computed at a time.
inline constexpr int decode_block = 64;
// Rows of a block: the queries of the heads that share its keys, or some of them.
inline constexpr int most_decode_rows = 8;
// More queries of a head are worth the tiles of the other kernels.
inline constexpr int64_t most_decode_queries = 8;
// A piece has so many keys at least; blocks are as many as it takes to give 132 multiprocessors four each.
inline constexpr int64_t least_decode_piece = 2 * decode_block;
inline constexpr int64_t most_decode_blocks = int64_t{4} * 132;

inline int64_t decode_row_tiles(const Sizes& sizes) {
  return device::tiles_of(rows_of(sizes), most_decode_rows);
}
inline int64_t decode_pieces(const Sizes& sizes, const Span& span) {
  return num_pieces(sizes, span, least_decode_piece, sizes.batch * sizes.num_kv_heads * decode_row_tiles(sizes),
                    most_decode_blocks);
}

// Whether a call is one of few queries and many keys, cut into pieces.
template <typename T>
bool decodes(const AttentionForward<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  return args.normalizer == nullptr && 1 <= sizes.num_queries && sizes.num_queries <= most_decode_queries &&
         decode_pieces(sizes, args.inputs.span) > 1;
}

// What pieces give for each row of the output, without having divided by the sum.
template <typename A>
struct DecodePartials {
  A* output;   // [B, Hq, Lq, pieces, Dv]
  A* softmax;  // [B, Hq, Lq, pieces, 2]: the largest score, and the sum of exp(score - largest)
  int64_t pieces;
};

// decodes(args).
template <typename T>
void launch_decode(const AttentionForward<T>& args, const DecodePartials<accumulate_t<T>>& partials);

template <typename T>
void launch_row_delta(const RowDelta<T>& args);

// args.grad_query is wanted.
template <typename T>
void launch_query_gradient(const AttentionBackward<T>& args);

// One of args.grad_key, grad_value and grad_key_bias is wanted.
template <typename T>
void launch_key_gradient(const AttentionBackward<T>& args);

}  // namespace torchops::kernels::span_attention
