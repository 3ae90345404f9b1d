#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "core/attention/arguments.h"
#include "span_attention/attention.h"

// From an operator's arguments to what the kernels of every device take.

namespace torchops {

// The arguments of span_attention behind query, key and value.
struct SpanOptions : AttentionSides {
  const c10::SymInt& block_size;
  const c10::SymInt& left;
  const c10::SymInt& right;
  bool is_causal;
  std::optional<double> scale;

  const AttentionSides& sides() const { return *this; }
  auto members() const { return std::tie(sides(), block_size, left, right, is_causal, scale); }
};

// Of query, key, value, key_bias and sink.
using SpanMask = AttentionMask<5>;

// The arguments of _span_attention_backward.
struct SpanBackward : AttentionGradients {
  SpanOptions options;
  SpanMask mask;

  const AttentionGradients& gradients() const { return *this; }
  auto members() const { return std::tie(gradients(), options, mask); }
};

// Gradients to query, key, value, key_bias and sink, undefined where nobody asks for them.
using SpanGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// value may be undefined: the backward does not always need it.
void check_span_attention(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const SpanOptions& options);
void check_span_attention_backward(const SpanBackward& args);

class SpanTensors : public AttentionTensors {
 public:
  SpanTensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t value_dim,
              const SpanOptions& options)
      : AttentionTensors(query, key, value, value_dim, options, options.scale),
        span_(kernels::span_attention::make_span(options.block_size.expect_int(), options.left.expect_int(),
                                                 options.right.expect_int(), options.is_causal)) {}

  template <typename T>
  kernels::span_attention::Attention<T> arguments() const {
    return {inputs<T>(), span_};
  }

 private:
  kernels::span_attention::Span span_;
};

}  // namespace torchops
