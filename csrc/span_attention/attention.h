#pragma once

#include "core/heads.h"
#include "core/scalar.h"
#include "span_attention/span.h"

// What the kernels of every device take.

namespace torchops::kernels::span_attention {

struct Sizes {
  int64_t batch;         // B
  int64_t num_heads;     // Hq, a multiple of Hkv
  int64_t num_kv_heads;  // Hkv
  int64_t num_queries;   // Lq
  int64_t num_keys;      // Lk
  int64_t head_dim;      // D, 1..256
  int64_t value_dim;     // Dv, 1..256

  // Query heads that share a key-value head: head h goes with h / group_size().
  constexpr int64_t group_size() const { return num_heads / num_kv_heads; }
};

// The score of query i for key j is scale * (query_i . key_j) + key_bias_j where the span shows the key
// to the query, and -inf elsewhere.
template <typename T>
struct Attention {
  Heads<const T> query;             // [B, Hq, Lq, D]
  Heads<const T> key;               // [B, Hkv, Lk, D]
  Heads<const T> value;             // [B, Hkv, Lk, Dv]
  const accumulate_t<T>* key_bias;  // [B, Lk], or null for 0
  const accumulate_t<T>* sink;      // [Hq], or null for none
  const int64_t* query_start;       // [B], or null for Lk - Lq
  const int64_t* key_start;         // [B], or null for 0
  Sizes sizes;
  Span span;
  accumulate_t<T> scale;

  constexpr Sequence sequence(int64_t batch) const {
    return make_sequence(query_start == nullptr ? sizes.num_keys - sizes.num_queries : query_start[batch],
                         key_start == nullptr ? 0 : key_start[batch], sizes.num_queries, sizes.num_keys);
  }
};

// logsumexp = log(sum over keys of exp(score) + exp(sink)), output = sum of exp(score - logsumexp) value.
// A query that sees no key gets zeros, and logsumexp = sink, or -inf without one.
template <typename T>
struct AttentionForward {
  Attention<T> inputs;
  Heads<T> output;             // [B, Hq, Lq, Dv]
  accumulate_t<T>* logsumexp;  // [B, Hq, Lq], or null
};

// With P = exp(score - logsumexp) and dP = grad_output . value, the gradient to a score is P (dP - delta),
// where delta = (grad_output . output) - grad_logsumexp of its query.
template <typename T>
struct AttentionBackward {
  Attention<T> inputs;
  Heads<const T> grad_output;        // [B, Hq, Lq, Dv]
  const accumulate_t<T>* logsumexp;  // [B, Hq, Lq]
  const accumulate_t<T>* delta;      // [B, Hq, Lq]
  Heads<T> grad_query;               // [B, Hq, Lq, D], or null data when nobody asks for it
  Heads<T> grad_key;                 // [B, Hkv, Lk, D], or null data
  Heads<T> grad_value;               // [B, Hkv, Lk, Dv], or null data
  accumulate_t<T>* grad_key_bias;    // [B, Hkv, Lk]: each key-value head's share, or null
};

// delta[b, h, i] = sum over d of grad_output * output, less grad_logsumexp.
template <typename T>
struct RowDelta {
  Heads<const T> grad_output;             // [B, Hq, Lq, Dv]
  Heads<const T> output;                  // [B, Hq, Lq, Dv]
  const accumulate_t<T>* grad_logsumexp;  // [B, Hq, Lq], or null for 0
  accumulate_t<T>* delta;                 // [B, Hq, Lq]
  Sizes sizes;
};

// grad_sink[h] = - sum over b, i of exp(sink - logsumexp) * delta: the sink's value is 0.
template <typename A>
struct SinkGradient {
  const A* sink;       // [Hq]
  const A* logsumexp;  // [B, Hq, Lq]
  const A* delta;      // [B, Hq, Lq]
  A* grad_sink;        // [Hq]
  Sizes sizes;
};

}  // namespace torchops::kernels::span_attention
