#pragma once

#include "core/heads.h"
#include "core/scalar.h"
#include "span_attention/attention.h"
#include "sparse_attention/lists.h"

// What the kernels of every device take.

namespace torchops::kernels::sparse_attention {

using span_attention::make_normalizer;
using span_attention::Normalizer;
using span_attention::Sizes;

// The score of query i for key j, as often as the query's list names it, is scale * (query_i . key_j) + key_bias_j +
// the entry's pair_bias where the query sees the key.
template <typename T>
struct Attention {
  Heads<const T> query;              // [B, Hq, Lq, D]
  Heads<const T> key;                // [B, Hkv, Lk, D]
  Heads<const T> value;              // [B, Hkv, Lk, Dv]
  Lists lists;                       // [B, Hi, Nq, k]
  const accumulate_t<T>* key_bias;   // [B, Lk], or null for 0
  const accumulate_t<T>* pair_bias;  // [B, bias_heads, Nq, k], or null for 0
  const accumulate_t<T>* sink;       // [Hq], or null for none
  const int64_t* query_start;        // [B], or null for Lk - Lq
  const int64_t* key_start;          // [B], or null for 0
  int64_t bias_heads;                // divides Hq
  Sizes sizes;
  ListRule rule;
  accumulate_t<T> scale;

  constexpr Sequence sequence(int64_t batch) const {
    return make_sequence(query_start == nullptr ? sizes.num_keys - sizes.num_queries : query_start[batch],
                         key_start == nullptr ? 0 : key_start[batch], sizes.num_queries, sizes.num_keys);
  }
  // The head of the lists, resp. of pair_bias, that goes with a query's.
  constexpr int64_t list_head(int64_t head) const { return head / (sizes.num_heads / lists.num_heads); }
  constexpr int64_t bias_head(int64_t head) const { return head / (sizes.num_heads / bias_heads); }
  // pair_bias of a list, or null.
  constexpr const accumulate_t<T>* biases_of(int64_t batch, int64_t head, int64_t list) const {
    return pair_bias == nullptr
               ? nullptr
               : pair_bias + ((batch * bias_heads + bias_head(head)) * lists.num_lists + list) * lists.num_listed;
  }
};

// logsumexp = log(sum over listed keys of exp(score) + exp(sink)), output = sum of exp(score - logsumexp) value.
// A query that sees no key gets zeros, and logsumexp = sink, or -inf without one.
template <typename T>
struct AttentionForward {
  Attention<T> inputs;
  Heads<T> output;                          // [B, Hq, Lq, Dv]
  accumulate_t<T>* logsumexp;               // [B, Hq, Lq], or null
  Normalizer<accumulate_t<T>>* normalizer;  // [B, Hq, Lq], or null where no backward follows
};

// With the probability P and dP = grad_output . value, the gradient to a score is P (dP - delta), where
// delta = (grad_output . output) - grad_logsumexp of its query; it is 0 where P is 0, whatever the others are.
template <typename T>
struct AttentionBackward {
  Attention<T> inputs;                            // value has null data when it only would get a gradient
  Heads<const T> grad_output;                     // [B, Hq, Lq, Dv], null data with Dv = 0 for none
  const Normalizer<accumulate_t<T>>* normalizer;  // [B, Hq, Lq]
  const accumulate_t<T>* delta;                   // [B, Hq, Lq], or null where no gradient to scores is wanted
  Heads<T> grad_query;                            // [B, Hq, Lq, D], or null data when nobody asks for it
  Heads<T> grad_key;                              // [B, Hkv, Lk, D], or null data
  Heads<T> grad_value;                            // [B, Hkv, Lk, Dv], or null data
  accumulate_t<T>* grad_key_bias;                 // [B, Hkv, Lk]: each key-value head's share, or null
  accumulate_t<T>* grad_pair_bias;                // [B, Hq, Nq, k] of zeros: each query head's share, or null
};

using span_attention::RowDelta;

}  // namespace torchops::kernels::sparse_attention
