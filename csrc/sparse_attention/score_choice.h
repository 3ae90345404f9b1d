#pragma once

#include <cstdint>

#include "core/attention/attention.h"
#include "sparse_attention/lists.h"

// The choice of keys by scores, the one rule that every kernel goes by. What a list may name, a key or a block of keys,
// has the largest score of a query that goes by the list and a key that the query sees. Of these the larger comes
// first, then the earlier key or block; -0 is as large as 0, and a score that is NaN is none.

namespace torchops::kernels::sparse_attention {

// A key that its bias hides with -inf is seen by no query; there are no values, sinks and scale.
template <typename T>
struct ScoreChoice : attention::Inputs<T> {
  const accumulate_t<T>* weights;  // [B, Hq, Lq], or null: then every head has lists of its own
  bool relu;
  ListRule rule;
  int64_t num_chosen;  // k

  // Heads of the lists, and of queries that go by one of them.
  constexpr int64_t list_heads() const { return weights == nullptr ? this->sizes.num_heads : 1; }
  constexpr int64_t heads_of_list() const { return weights == nullptr ? 1 : this->sizes.num_heads; }
  constexpr int64_t num_lists() const { return (this->sizes.num_queries + rule.query_block - 1) / rule.query_block; }
  // Of one head of the lists.
  constexpr Range queries_of_lists(int64_t first_list, int64_t count) const {
    return {first_list * rule.query_block, clamp((first_list + count) * rule.query_block, 0, this->sizes.num_queries)};
  }
  constexpr const accumulate_t<T>* key_biases_of(int64_t batch) const {
    return this->key_bias == nullptr ? nullptr : this->key_bias + batch * this->sizes.num_keys;
  }
  constexpr accumulate_t<T> weight(int64_t batch, int64_t head, int64_t query) const {
    return weights[(batch * this->sizes.num_heads + head) * this->sizes.num_queries + query];
  }
  constexpr int64_t offset_of_list(int64_t batch, int64_t list_head, int64_t list) const {
    return ((batch * list_heads() + list_head) * num_lists() + list) * num_chosen;
  }
};

// What a list may name of the first `end` keys: `count` entries from `first` on. Entries have 32 bits.
struct Names {
  int64_t first;
  int64_t count;
};

TORCHOPS_INLINE Names names_of(const ListRule& rule, const Sequence& sequence, int64_t end) {
  if (rule.block_size == 1) {
    return {0, end};
  }
  const int64_t last = sequence.key_start + end - 1;
  if (end == 0 || last < 0) {
    return {0, 0};
  }
  const int64_t first = (sequence.key_start > 0 ? sequence.key_start : 0) / rule.block_size;
  return {first, clamp(clamp(last / rule.block_size + 1, 0, int64_t{1} << 31) - first, 0, end)};
}

}  // namespace torchops::kernels::sparse_attention
