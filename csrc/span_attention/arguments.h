#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "core/tensors.h"
#include "span_attention/attention.h"

// From an operator's arguments to what the kernels of every device take.

namespace torchops {

// What a tile of every kernel has room for.
inline constexpr int64_t largest_head_dim = 256;

// The arguments of span_attention behind query, key and value.
struct SpanOptions {
  const std::optional<at::Tensor>& key_bias;     // [B, Lk]
  const std::optional<at::Tensor>& sink;         // [Hq]
  const std::optional<at::Tensor>& query_start;  // [B]
  const std::optional<at::Tensor>& key_start;    // [B]
  const c10::SymInt& block_size;
  const c10::SymInt& left;
  const c10::SymInt& right;
  bool is_causal;
  std::optional<double> scale;

  auto members() const {
    return std::tie(key_bias, sink, query_start, key_start, block_size, left, right, is_causal, scale);
  }
};

// Which of query, key, value, key_bias and sink have gradients, and what those are made of.
struct SpanMask {
  std::array<bool, 5> wanted;

  auto members() const { return std::tie(wanted); }
  bool query() const { return wanted[0]; }
  bool key() const { return wanted[1]; }
  bool value() const { return wanted[2]; }
  bool key_bias() const { return wanted[3]; }
  bool sink() const { return wanted[4]; }
  // Gradients to scores take probabilities, and of a gradient to the output its products with values, less delta.
  bool scores() const { return query() || key() || key_bias(); }
  // Probabilities take queries, keys, their biases and positions.
  bool probabilities() const { return scores() || value(); }
  // Delta takes the output.
  bool delta() const { return scores() || sink(); }
};

// The arguments of _span_attention_backward; absent is what the gradients are not made of.
struct SpanBackward {
  const std::optional<at::Tensor>& grad_output;     // [B, Hq, Lq, Dv]
  const std::optional<at::Tensor>& grad_logsumexp;  // [B, Hq, Lq]
  const std::optional<at::Tensor>& query;
  const std::optional<at::Tensor>& key;
  const std::optional<at::Tensor>& value;
  const std::optional<at::Tensor>& output;  // [B, Hq, Lq, Dv]
  const at::Tensor& normalizer;             // [B, Hq, Lq, 2]
  SpanOptions options;
  SpanMask mask;

  auto members() const {
    return std::tie(grad_output, grad_logsumexp, query, key, value, output, normalizer, options, mask);
  }
  // Without a gradient to the output, values and outputs are as if they had no columns.
  int64_t value_dim() const { return grad_output ? grad_output->size(3) : 0; }
  // Those of rows of queries; the others are not looked at.
  kernels::span_attention::Sizes row_sizes() const {
    return {normalizer.size(0), normalizer.size(1), normalizer.size(1), normalizer.size(2), 0, 0, value_dim()};
  }
};

// Gradients to query, key, value, key_bias and sink, undefined where nobody asks for them.
using SpanGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// value may be undefined: the backward does not always need it.
void check_span_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const SpanOptions& options);
void check_span_attention_backward(const SpanBackward& args);

at::Tensor empty_with_layout_of(const at::Tensor& model, const c10::SymInt& last_dim);
at::Tensor empty_logsumexp(const at::Tensor& query);
at::Tensor empty_normalizer(const at::Tensor& query);
// grad_value in key's layout.
SpanGradients empty_gradients(const SpanBackward& args, const SpanMask& mask);

// The tensors as kernels read them, kept alive for as long as their arguments are used: rows are contiguous,
// side inputs contiguous and of the accumulation dtype, positions int64.
class SpanTensors {
 public:
  // value may be undefined, where value_dim tells how many columns it would have.
  SpanTensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t value_dim,
              const SpanOptions& options)
      : query_(with_contiguous_rows(query)),
        key_(with_contiguous_rows(key)),
        value_(value.defined() ? with_contiguous_rows(value) : value),
        value_dim_(value_dim),
        key_bias_(contiguous(options.key_bias, at::toOpMathType(query.scalar_type()))),
        sink_(contiguous(options.sink, at::toOpMathType(query.scalar_type()))),
        query_start_(contiguous(options.query_start, at::kLong)),
        key_start_(contiguous(options.key_start, at::kLong)),
        span_(kernels::span_attention::make_span(options.block_size.expect_int(), options.left.expect_int(),
                                                 options.right.expect_int(), options.is_causal)),
        scale_(options.scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3))))) {}

  kernels::span_attention::Sizes sizes() const {
    return {query_.size(0), query_.size(1), key_.size(1), query_.size(2), key_.size(2), query_.size(3), value_dim_};
  }

  template <typename T>
  kernels::span_attention::Attention<T> arguments() const {
    using A = kernels::accumulate_t<T>;
    return {heads<T>(query_),
            heads<T>(key_),
            heads<T>(value_),
            data_or_null<A>(key_bias_),
            data_or_null<A>(sink_),
            data_or_null<int64_t>(query_start_),
            data_or_null<int64_t>(key_start_),
            sizes(),
            span_,
            static_cast<A>(scale_)};
  }

 private:
  static at::Tensor contiguous(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
    return tensor ? tensor->to(dtype).contiguous() : at::Tensor();
  }

  at::Tensor query_, key_, value_;
  int64_t value_dim_;
  at::Tensor key_bias_, sink_, query_start_, key_start_;
  kernels::span_attention::Span span_;
  double scale_;
};

template <typename A>
kernels::span_attention::Normalizer<A>* normalizers(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<kernels::span_attention::Normalizer<A>*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace torchops
