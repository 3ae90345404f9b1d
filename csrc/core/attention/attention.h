#pragma once

#include <cstdint>
#include <limits>

#include "core/attention/positions.h"
#include "core/heads.h"
#include "core/scalar.h"

// What the kernels of every attention take, on every device. Families differ in which keys a query sees: what they add
// to these is that.

namespace torchops::kernels::attention {

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

// The score of query i for a key j that it sees is scale * (query_i . key_j) + key_bias_j.
template <typename T>
struct Inputs {
  Heads<const T> query;             // [B, Hq, Lq, D]
  Heads<const T> key;               // [B, Hkv, Lk, D]
  Heads<const T> value;             // [B, Hkv, Lk, Dv]
  const accumulate_t<T>* key_bias;  // [B, Lk], or null for 0
  const accumulate_t<T>* sink;      // [Hq], or null for none
  const int64_t* query_start;       // [B], or null for Lk - Lq
  const int64_t* key_start;         // [B], or null for 0
  Sizes sizes;
  accumulate_t<T> scale;

  constexpr Sequence sequence(int64_t batch) const {
    return sequence_of(query_start, key_start, batch, sizes.num_queries, sizes.num_keys);
  }
};

// What makes a probability of a query's score: exp(score - largest) * inverse_sum. The backward computes scores as the
// forward did, to the last bit, so that a distance from the largest is right whatever their magnitude; a logsumexp has
// lost the logarithm of the sum where scores are large. Both may take other numbers for scores, where they know how
// these come from them.
template <typename A>
struct alignas(2 * sizeof(A)) Normalizer {
  A largest;
  A inverse_sum;
};

// From the largest score and the sum of exp(score - largest), which is 0 where all scores are -inf: then every
// probability is 0.
template <typename A>
TORCHOPS_INLINE Normalizer<A> make_normalizer(A largest, A sum) {
  return sum == 0 ? Normalizer<A>{std::numeric_limits<A>::infinity(), 0} : Normalizer<A>{largest, 1 / sum};
}

// logsumexp = log(sum over keys of exp(score) + exp(sink)), output = sum of exp(score - logsumexp) value.
// A query that sees no key gets zeros, and logsumexp = sink, or -inf without one.
// FamilyInputs are Inputs<T> and what the family adds.
template <typename FamilyInputs, typename T>
struct Forward {
  FamilyInputs inputs;
  Heads<T> output;                          // [B, Hq, Lq, Dv]
  accumulate_t<T>* logsumexp;               // [B, Hq, Lq], or null
  Normalizer<accumulate_t<T>>* normalizer;  // [B, Hq, Lq], or null where no backward follows
};

// With the probability P and dP = grad_output . value, the gradient to a score is P (dP - delta), where
// delta = (grad_output . output) - grad_logsumexp of its query; it is 0 where P is 0, whatever the others are.
template <typename FamilyInputs, typename T>
struct Backward {
  FamilyInputs inputs;                            // value has null data when it only would get a gradient
  Heads<const T> grad_output;                     // [B, Hq, Lq, Dv], null data with Dv = 0 for none
  const Normalizer<accumulate_t<T>>* normalizer;  // [B, Hq, Lq]
  const accumulate_t<T>* delta;                   // [B, Hq, Lq], or null where no gradient to scores is wanted
  Heads<T> grad_query;                            // [B, Hq, Lq, D], or null data when nobody asks for it
  Heads<T> grad_key;                              // [B, Hkv, Lk, D], or null data
  Heads<T> grad_value;                            // [B, Hkv, Lk, Dv], or null data
  accumulate_t<T>* grad_key_bias;                 // [B, Hkv, Lk]: each key-value head's share, or null
};

// delta[b, h, i] = sum over d of grad_output * output, less grad_logsumexp. It is summed up as dP is: where a query
// sees a single key, whose value the output then is, they are the same to the last bit.
template <typename T>
struct RowDelta {
  Heads<const T> grad_output;             // [B, Hq, Lq, Dv]
  Heads<const T> output;                  // [B, Hq, Lq, Dv]
  const accumulate_t<T>* grad_logsumexp;  // [B, Hq, Lq], or null for 0
  accumulate_t<T>* delta;                 // [B, Hq, Lq]
  Sizes sizes;
};

// grad_sink[h] = - sum over b, i of the sink's probability times delta: the sink's value is 0.
template <typename A>
struct SinkGradient {
  const A* sink;                    // [Hq]
  const Normalizer<A>* normalizer;  // [B, Hq, Lq]
  const A* delta;                   // [B, Hq, Lq]
  A* grad_sink;                     // [Hq]
  Sizes sizes;
};

}  // namespace torchops::kernels::attention
