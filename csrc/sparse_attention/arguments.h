#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/attention/arguments.h"
#include "sparse_attention/attention.h"

// From an operator's arguments to what the kernels of every device take.

namespace torchops {

// Kernels count the queries and keys of a sequence, and the entries of a list, in 32 bits.
inline constexpr int64_t longest = int64_t{1} << 30;

// The arguments of topk_attention behind query, key, value and indices.
struct TopkOptions : AttentionSides {
  const std::optional<at::Tensor>& pair_bias;  // [B, Hi or Hq, Nq, k]
  const c10::SymInt& block_size;
  const c10::SymInt& query_block;
  bool is_causal;
  std::optional<double> scale;

  const AttentionSides& sides() const { return *this; }
  auto members() const { return std::tie(sides(), pair_bias, block_size, query_block, is_causal, scale); }
};

// Of query, key, value, key_bias, sink and pair_bias.
struct TopkMask : AttentionMask<6> {
  bool pair_bias() const { return wanted[5]; }
};

// The arguments of _topk_attention_backward.
struct TopkBackward : AttentionGradients {
  const std::optional<at::Tensor>& indices;
  TopkOptions options;
  TopkMask mask;

  const AttentionGradients& gradients() const { return *this; }
  auto members() const { return std::tie(gradients(), indices, options, mask); }
};

// Gradients to query, key, value, key_bias, sink and pair_bias, undefined where nobody asks for them.
using TopkGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// As kernels go by it: blocks as long as the sequence are as good as longer ones, and no products of them overflow.
inline kernels::sparse_attention::ListRule rule_of(const c10::SymInt& block_size, const c10::SymInt& query_block,
                                                   bool is_causal, int64_t num_queries) {
  return {std::min(block_size.expect_int(), kernels::attention::unbounded),
          std::min(query_block.expect_int(), std::max<int64_t>(num_queries, 1)), is_causal};
}

inline kernels::sparse_attention::ListRule rule_of(const TopkOptions& options, int64_t num_queries) {
  return rule_of(options.block_size, options.query_block, options.is_causal, num_queries);
}

// What blocks of keys and of queries may be.
void check_blocks(const Checks& check, const c10::SymInt& block_size, const c10::SymInt& query_block);
// value may be undefined: the backward does not always need it.
void check_topk_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& indices, const TopkOptions& options);
void check_topk_attention_backward(const TopkBackward& args);

class TopkTensors : public AttentionTensors {
 public:
  TopkTensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t value_dim,
              const at::Tensor& indices, const TopkOptions& options)
      : AttentionTensors(query, key, value, value_dim, options, options.scale),
        indices_(with_contiguous_rows(indices)),
        pair_bias_(contiguous_or_undefined(options.pair_bias, accumulated())),
        rule_(rule_of(options, query.size(2))) {}

  template <typename T>
  kernels::sparse_attention::Attention<T> arguments() const {
    const bool wide = indices_.scalar_type() == at::kLong;
    return {inputs<T>(),
            {wide ? kernels::Heads<const int32_t>{} : heads<int32_t>(indices_),
             wide ? heads<int64_t>(indices_) : kernels::Heads<const int64_t>{}, indices_.size(1), indices_.size(2),
             indices_.size(3), nullptr},
            data_or_null<kernels::accumulate_t<T>>(pair_bias_),
            pair_bias_.defined() ? pair_bias_.size(1) : 1,
            rule_};
  }

 private:
  at::Tensor indices_, pair_bias_;
  kernels::sparse_attention::ListRule rule_;
};

}  // namespace torchops
