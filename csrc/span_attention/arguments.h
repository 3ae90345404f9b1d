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

// The keyword arguments of span_attention.
struct SpanOptions {
  const c10::SymInt& block_size;
  const c10::SymInt& left;
  const c10::SymInt& right;
  bool is_causal;
  std::optional<double> scale;
  const std::optional<at::Tensor>& key_bias;     // [B, Lk]
  const std::optional<at::Tensor>& sink;         // [Hq]
  const std::optional<at::Tensor>& query_start;  // [B]
  const std::optional<at::Tensor>& key_start;    // [B]
};

// Gradients to query, key, value, key_bias and sink, undefined where nobody asks for them.
using SpanGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check_span_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const SpanOptions& options);

void check_span_attention_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& grad_logsumexp,
                                   const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   const at::Tensor& output, const at::Tensor& logsumexp, const SpanOptions& options,
                                   std::array<bool, 5> output_mask);

at::Tensor empty_with_layout_of(const at::Tensor& model, const c10::SymInt& last_dim);
at::Tensor empty_logsumexp(const at::Tensor& query);
SpanGradients empty_gradients(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const SpanOptions& options, std::array<bool, 5> output_mask);

// The tensors as kernels read them, kept alive for as long as their arguments are used: rows are contiguous,
// side inputs contiguous and of the accumulation dtype, positions int64.
class SpanTensors {
 public:
  SpanTensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const SpanOptions& options)
      : query_(with_contiguous_rows(query)),
        key_(with_contiguous_rows(key)),
        value_(with_contiguous_rows(value)),
        key_bias_(contiguous(options.key_bias, at::toOpMathType(query.scalar_type()))),
        sink_(contiguous(options.sink, at::toOpMathType(query.scalar_type()))),
        query_start_(contiguous(options.query_start, at::kLong)),
        key_start_(contiguous(options.key_start, at::kLong)),
        span_(kernels::span_attention::make_span(options.block_size.expect_int(), options.left.expect_int(),
                                                 options.right.expect_int(), options.is_causal)),
        scale_(options.scale.value_or(1 / std::sqrt(static_cast<double>(query.size(3))))) {}

  kernels::span_attention::Sizes sizes() const {
    return {query_.size(0), query_.size(1), key_.size(1), query_.size(2), key_.size(2), query_.size(3), value_.size(3)};
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

  const at::Tensor& sink() const { return sink_; }

 private:
  static at::Tensor contiguous(const std::optional<at::Tensor>& tensor, at::ScalarType dtype) {
    return tensor ? tensor->to(dtype).contiguous() : at::Tensor();
  }

  at::Tensor query_, key_, value_, key_bias_, sink_, query_start_, key_start_;
  kernels::span_attention::Span span_;
  double scale_;
};

}  // namespace torchops
