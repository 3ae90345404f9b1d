#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../core/export.h"

// Attention over a span of keys: full, blocks or sliding windows, by one rule. docs/span_attention.md has
// the mathematics.

namespace torchops {

// query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], key_bias [B, Lk], sink [Hq],
// query_start and key_start int64 or int32 [B] -> [B, Hq, Lq, Dv]
TORCHOPS_API at::Tensor span_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                       c10::SymInt block_size = 1, c10::SymInt left = -1, c10::SymInt right = -1,
                                       bool is_causal = false, std::optional<double> scale = std::nullopt,
                                       const std::optional<at::Tensor>& key_bias = std::nullopt,
                                       const std::optional<at::Tensor>& sink = std::nullopt,
                                       const std::optional<at::Tensor>& query_start = std::nullopt,
                                       const std::optional<at::Tensor>& key_start = std::nullopt);

// The same and the logarithm of the softmax's denominator [B, Hq, Lq].
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> span_attention_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, c10::SymInt block_size = 1,
    c10::SymInt left = -1, c10::SymInt right = -1, bool is_causal = false, std::optional<double> scale = std::nullopt,
    const std::optional<at::Tensor>& key_bias = std::nullopt, const std::optional<at::Tensor>& sink = std::nullopt,
    const std::optional<at::Tensor>& query_start = std::nullopt,
    const std::optional<at::Tensor>& key_start = std::nullopt);

}  // namespace torchops
