#pragma once

#include "core/attention/attention.h"
#include "span_attention/span.h"

// What the kernels of every device take.

namespace torchops::kernels::span_attention {

// Scores are -inf where the span does not show the key to the query.
template <typename T>
struct Attention : attention::Inputs<T> {
  Span span;
};

template <typename T>
using AttentionForward = attention::Forward<Attention<T>, T>;
template <typename T>
using AttentionBackward = attention::Backward<Attention<T>, T>;

}  // namespace torchops::kernels::span_attention
