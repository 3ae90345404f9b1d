#pragma once

#include "sparse_attention/attention.h"

// What the kernels of topk_scores take, on every device. A query has k * block_size columns: block_size for each entry
// of its list, in the list's order, one for each position of the block. A column that has no key, or one that the query
// does not see, is -inf, and its gradient is not looked at.

namespace torchops::kernels::sparse_attention {

// The key of an entry's first column, which lies in front of all keys where they begin within the block. Entries that
// name no key have none.
TORCHOPS_INLINE int64_t first_column_key(const ListRule& rule, const Sequence& sequence, int64_t entry) {
  return rule.block_size == 1 ? entry : entry * rule.block_size - sequence.key_start;
}

template <typename T>
constexpr int64_t num_columns(const Attention<T>& inputs) {
  return inputs.lists.num_listed * inputs.rule.block_size;
}

template <typename T>
struct Scores {
  Attention<T> inputs;            // without values, biases and sinks
  Heads<accumulate_t<T>> scores;  // [B, Hq, Lq, k block_size]
};

template <typename T>
struct ScoreGradients {
  Attention<T> inputs;  // those of the forward; gradients to queries are made of keys, those to keys of queries
  Heads<const accumulate_t<T>> grad;  // [B, Hq, Lq, k block_size]
  Heads<T> grad_query;                // [B, Hq, Lq, D], or null data when nobody asks for it
  Heads<T> grad_key;                  // [B, Hkv, Lk, D], or null data
};

}  // namespace torchops::kernels::sparse_attention
