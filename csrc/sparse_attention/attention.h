#pragma once

#include "core/attention/attention.h"
#include "sparse_attention/lists.h"

// What the kernels of every device take.

namespace torchops::kernels::sparse_attention {

// Heads of keys, of lists and of biases each divide those of queries, and are 1 or divide each other.
constexpr int64_t heads_of_list(int64_t num_heads, int64_t num_kv_heads, int64_t list_heads, int64_t bias_heads) {
  const int64_t most = list_heads > num_kv_heads ? list_heads : num_kv_heads;
  return num_heads / (bias_heads > most ? bias_heads : most);
}

// Whether so many queries share a list, of `heads` heads in all, that gathering its keys for products of matrices pays:
// about as many as it takes to make up for turning them into panels.
constexpr bool by_tile(int64_t query_block, int64_t heads) {
  constexpr int64_t worth_gathering = 8;
  return query_block * heads >= worth_gathering;
}

// A query has a score for a key as often as its list names the key; the entry's pair_bias is added to it.
template <typename T>
struct Attention : attention::Inputs<T> {
  Lists lists;                       // [B, Hi, Nq, k]
  const accumulate_t<T>* pair_bias;  // [B, bias_heads, Nq, k], or null for 0
  int64_t bias_heads;                // divides Hq; 1 where there is no pair_bias
  ListRule rule;

  // The head of the lists, resp. of pair_bias, that goes with a query's.
  constexpr int64_t list_head(int64_t head) const { return head / (this->sizes.num_heads / lists.num_heads); }
  constexpr int64_t bias_head(int64_t head) const { return head / (this->sizes.num_heads / bias_heads); }
  // Heads one behind the other that share keys, lists and biases of lists.
  constexpr int64_t heads_of_list() const {
    return sparse_attention::heads_of_list(this->sizes.num_heads, this->sizes.num_kv_heads, lists.num_heads,
                                           bias_heads);
  }
  // pair_bias of a list, or null.
  constexpr const accumulate_t<T>* biases_of(int64_t batch, int64_t head, int64_t list) const {
    return pair_bias == nullptr
               ? nullptr
               : pair_bias + ((batch * bias_heads + bias_head(head)) * lists.num_lists + list) * lists.num_listed;
  }
  constexpr const accumulate_t<T>* key_biases_of(int64_t batch) const {
    return this->key_bias == nullptr ? nullptr : this->key_bias + batch * this->sizes.num_keys;
  }
};

template <typename T>
constexpr bool by_tile(const Attention<T>& inputs) {
  return by_tile(inputs.rule.query_block, inputs.heads_of_list());
}

template <typename T>
using AttentionForward = attention::Forward<Attention<T>, T>;

template <typename T>
struct AttentionBackward : attention::Backward<Attention<T>, T> {
  accumulate_t<T>* grad_pair_bias;  // [B, Hq, Nq, k] of zeros: each query head's share, or null

  // The shares of a list, or null.
  constexpr accumulate_t<T>* grad_biases_of(int64_t batch, int64_t head, int64_t list) const {
    const Lists& lists = this->inputs.lists;
    return grad_pair_bias == nullptr
               ? nullptr
               : grad_pair_bias +
                     ((batch * this->inputs.sizes.num_heads + head) * lists.num_lists + list) * lists.num_listed;
  }
};

}  // namespace torchops::kernels::sparse_attention
