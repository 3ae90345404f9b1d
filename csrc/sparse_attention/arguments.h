#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "core/autograd.h"
#include "core/tensors.h"
#include "span_attention/arguments.h"
#include "sparse_attention/attention.h"

// From an operator's arguments to what the kernels of every device take. The dispatcher hands arguments over one by
// one; `boundary` makes structs of them, and everything behind it takes those.

namespace torchops {

struct TopkOptions {
  c10::SymInt block_size;
  c10::SymInt query_block;
  bool is_causal;
  std::optional<double> scale;
  std::optional<at::Tensor> key_bias;     // [B, Lk]
  std::optional<at::Tensor> pair_bias;    // [B, Hi or Hq, Nq, k]
  std::optional<at::Tensor> sink;         // [Hq]
  std::optional<at::Tensor> query_start;  // [B]
  std::optional<at::Tensor> key_start;    // [B]
};

struct TopkInputs {
  at::Tensor query;    // [B, Hq, Lq, D]
  at::Tensor key;      // [B, Hkv, Lk, D]
  at::Tensor value;    // [B, Hkv, Lk, Dv]
  at::Tensor indices;  // [B, Hi, Nq, k]
  TopkOptions options;
};

// Which of query, key, value, key_bias, pair_bias and sink have gradients, and what those are made of.
struct TopkMask {
  std::array<bool, 6> wanted;

  bool query() const { return wanted[0]; }
  bool key() const { return wanted[1]; }
  bool value() const { return wanted[2]; }
  bool key_bias() const { return wanted[3]; }
  bool pair_bias() const { return wanted[4]; }
  bool sink() const { return wanted[5]; }
  // Gradients to scores take probabilities, and of a gradient to the output its products with values, less delta.
  bool scores() const { return query() || key() || key_bias() || pair_bias(); }
  // Probabilities take queries, keys, their biases, lists and positions.
  bool probabilities() const { return scores() || value(); }
  // Delta takes the output.
  bool delta() const { return scores() || sink(); }
};

// The arguments of _topk_attention_backward; absent is what the gradients are not made of.
struct TopkBackward {
  std::optional<at::Tensor> grad_output;     // [B, Hq, Lq, Dv]
  std::optional<at::Tensor> grad_logsumexp;  // [B, Hq, Lq]
  std::optional<at::Tensor> query;
  std::optional<at::Tensor> key;
  std::optional<at::Tensor> value;
  std::optional<at::Tensor> indices;
  std::optional<at::Tensor> output;  // [B, Hq, Lq, Dv]
  at::Tensor normalizer;             // [B, Hq, Lq, 2]
  TopkOptions options;
  TopkMask mask;

  // Without a gradient to the output, values and outputs are as if they had no columns.
  int64_t value_dim() const { return grad_output ? grad_output->size(3) : 0; }
  // Those of rows of queries; the others are not looked at.
  kernels::sparse_attention::Sizes row_sizes() const {
    return {normalizer.size(0), normalizer.size(1), normalizer.size(1), normalizer.size(2), 0, 0, value_dim()};
  }
};

// Gradients to query, key, value, key_bias, pair_bias and sink, undefined where nobody asks for them.
using TopkGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// An implementation as the dispatcher calls it.
template <auto body>
auto boundary(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& indices,
              const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& pair_bias,
              const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
              const std::optional<at::Tensor>& key_start, c10::SymInt block_size, c10::SymInt query_block,
              bool is_causal, std::optional<double> scale) {
  return body(TopkInputs{query,
                         key,
                         value,
                         indices,
                         {std::move(block_size), std::move(query_block), is_causal, scale, key_bias, pair_bias, sink,
                          query_start, key_start}});
}
template <auto body>
TopkGradients backward_boundary(const std::optional<at::Tensor>& grad_output,
                                const std::optional<at::Tensor>& grad_logsumexp, const std::optional<at::Tensor>& query,
                                const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                                const std::optional<at::Tensor>& indices, const std::optional<at::Tensor>& output,
                                const at::Tensor& normalizer, const std::optional<at::Tensor>& key_bias,
                                const std::optional<at::Tensor>& pair_bias, const std::optional<at::Tensor>& sink,
                                const std::optional<at::Tensor>& query_start,
                                const std::optional<at::Tensor>& key_start, c10::SymInt block_size,
                                c10::SymInt query_block, bool is_causal, std::optional<double> scale,
                                std::array<bool, 6> output_mask) {
  return body(TopkBackward{grad_output,
                           grad_logsumexp,
                           query,
                           key,
                           value,
                           indices,
                           output,
                           normalizer,
                           {std::move(block_size), std::move(query_block), is_causal, scale, key_bias, pair_bias, sink,
                            query_start, key_start},
                           {output_mask}});
}

// The other way round: calls the typed handle of an operator with this schema.
template <typename Op>
auto call(const Op& op, const TopkInputs& inputs) {
  const TopkOptions& options = inputs.options;
  return op.call(inputs.query, inputs.key, inputs.value, inputs.indices, options.key_bias, options.pair_bias,
                 options.sink, options.query_start, options.key_start, options.block_size, options.query_block,
                 options.is_causal, options.scale);
}

void check_topk_attention(const char* op, const TopkInputs& inputs);
void check_topk_attention_backward(const TopkBackward& args);

// grad_value in key's layout.
TopkGradients empty_gradients(const TopkBackward& args, const TopkMask& mask);

// The tensors as kernels read them, kept alive for as long as their arguments are used: rows are contiguous,
// side inputs contiguous and of the accumulation dtype, positions int64.
class TopkTensors {
 public:
  // value may be undefined, where value_dim tells how many columns it would have.
  TopkTensors(const TopkInputs& inputs, int64_t value_dim)
      : query_(with_contiguous_rows(inputs.query)),
        key_(with_contiguous_rows(inputs.key)),
        value_(inputs.value.defined() ? with_contiguous_rows(inputs.value) : inputs.value),
        indices_(with_contiguous_rows(inputs.indices)),
        value_dim_(value_dim),
        key_bias_(contiguous(inputs.options.key_bias, at::toOpMathType(query_.scalar_type()))),
        pair_bias_(contiguous(inputs.options.pair_bias, at::toOpMathType(query_.scalar_type()))),
        sink_(contiguous(inputs.options.sink, at::toOpMathType(query_.scalar_type()))),
        query_start_(contiguous(inputs.options.query_start, at::kLong)),
        key_start_(contiguous(inputs.options.key_start, at::kLong)),
        rule_{std::min(inputs.options.block_size.expect_int(), kernels::span_attention::Span::unbounded),
              std::min(inputs.options.query_block.expect_int(), std::max<int64_t>(query_.size(2), 1)),
              inputs.options.is_causal},
        scale_(inputs.options.scale.value_or(1 / std::sqrt(static_cast<double>(query_.size(3))))) {}

  kernels::sparse_attention::Sizes sizes() const {
    return {query_.size(0), query_.size(1), key_.size(1), query_.size(2), key_.size(2), query_.size(3), value_dim_};
  }
  // Of shares of the gradient to pair_bias, a query head's each.
  std::array<int64_t, 4> pair_shape() const {
    return {query_.size(0), query_.size(1), indices_.size(2), indices_.size(3)};
  }

  template <typename T>
  kernels::sparse_attention::Attention<T> arguments() const {
    using A = kernels::accumulate_t<T>;
    const bool wide = indices_.scalar_type() == at::kLong;
    return {heads<T>(query_),
            heads<T>(key_),
            heads<T>(value_),
            {wide ? kernels::Heads<const int32_t>{} : heads<int32_t>(indices_),
             wide ? heads<int64_t>(indices_) : kernels::Heads<const int64_t>{}, indices_.size(1), indices_.size(2),
             indices_.size(3)},
            data_or_null<A>(key_bias_),
            data_or_null<A>(pair_bias_),
            data_or_null<A>(sink_),
            data_or_null<int64_t>(query_start_),
            data_or_null<int64_t>(key_start_),
            pair_bias_.defined() ? pair_bias_.size(1) : 1,
            sizes(),
            rule_,
            static_cast<A>(scale_)};
  }

 private:
  static at::Tensor contiguous(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
    return tensor ? tensor->to(dtype).contiguous() : at::Tensor();
  }

  at::Tensor query_, key_, value_, indices_;
  int64_t value_dim_;
  at::Tensor key_bias_, pair_bias_, sink_, query_start_, key_start_;
  kernels::sparse_attention::ListRule rule_;
  double scale_;
};

}  // namespace torchops
