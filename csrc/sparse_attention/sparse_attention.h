#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../core/export.h"

// Attention over lists of keys, or of blocks of keys. docs/sparse_attention.md has the mathematics.

namespace torchops {

// query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], indices int64 or int32 [B, 1 or Hkv or Hq, Nq, k]
// with Nq = ceil(Lq / query_block), key_bias [B, Lk], pair_bias [B, indices's heads or Hq, Nq, k], sink [Hq],
// query_start and key_start int64 or int32 [B] -> [B, Hq, Lq, Dv]
TORCHOPS_API at::Tensor topk_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                       const at::Tensor& indices, c10::SymInt block_size = 1,
                                       c10::SymInt query_block = 1, bool is_causal = false,
                                       std::optional<double> scale = std::nullopt,
                                       const std::optional<at::Tensor>& key_bias = std::nullopt,
                                       const std::optional<at::Tensor>& pair_bias = std::nullopt,
                                       const std::optional<at::Tensor>& sink = std::nullopt,
                                       const std::optional<at::Tensor>& query_start = std::nullopt,
                                       const std::optional<at::Tensor>& key_start = std::nullopt);

// The same and the logarithm of the softmax's denominator [B, Hq, Lq].
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> topk_attention_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& indices,
    c10::SymInt block_size = 1, c10::SymInt query_block = 1, bool is_causal = false,
    std::optional<double> scale = std::nullopt, const std::optional<at::Tensor>& key_bias = std::nullopt,
    const std::optional<at::Tensor>& pair_bias = std::nullopt, const std::optional<at::Tensor>& sink = std::nullopt,
    const std::optional<at::Tensor>& query_start = std::nullopt,
    const std::optional<at::Tensor>& key_start = std::nullopt);

// The scores of topk_attention before its softmax, entry by entry: shapes as there -> float32 (float64 for float64)
// [B, Hq, Lq, k block_size], -inf where there is no key, or one that the query does not see
TORCHOPS_API at::Tensor topk_scores(const at::Tensor& query, const at::Tensor& key, const at::Tensor& indices,
                                    c10::SymInt block_size = 1, c10::SymInt query_block = 1, bool is_causal = false,
                                    std::optional<double> scale = std::nullopt,
                                    const std::optional<at::Tensor>& query_start = std::nullopt,
                                    const std::optional<at::Tensor>& key_start = std::nullopt);

// The nearest codeword of each part of each row: input [..., D], codebooks [M, E, D / M] -> uint8 [..., M]
TORCHOPS_API at::Tensor pq_encode(const at::Tensor& input, const at::Tensor& codebooks);

// The k keys that agree with each query in most codes: query_codes uint8 [B, Hq, Lq, M], key_codes uint8 [B, Hkv, Lk,
// M], key_bias [B, Lk], query_start and key_start int64 or int32 [B] -> int32 [B, Hq, Lq, k], ascending, -1 behind
TORCHOPS_API at::Tensor pq_topk(const at::Tensor& query_codes, const at::Tensor& key_codes, c10::SymInt k,
                                bool is_causal = false, c10::SymInt sink_keys = 0, c10::SymInt local_keys = 0,
                                const std::optional<at::Tensor>& key_bias = std::nullopt,
                                const std::optional<at::Tensor>& query_start = std::nullopt,
                                const std::optional<at::Tensor>& key_start = std::nullopt);

// The k keys, or blocks of keys, of the largest scores: query [B, Hq, Lq, D], key [B, Hkv, Lk, D], weights [B, Hq, Lq],
// which add heads up, key_bias, query_start and key_start as in pq_topk -> int32 [B, Hq or with weights 1, Nq, k] with
// Nq = ceil(Lq / query_block), ascending, -1 behind
TORCHOPS_API at::Tensor score_topk(const at::Tensor& query, const at::Tensor& key, c10::SymInt k,
                                   const std::optional<at::Tensor>& weights = std::nullopt, bool relu = false,
                                   c10::SymInt block_size = 1, c10::SymInt query_block = 1, bool is_causal = false,
                                   const std::optional<at::Tensor>& key_bias = std::nullopt,
                                   const std::optional<at::Tensor>& query_start = std::nullopt,
                                   const std::optional<at::Tensor>& key_start = std::nullopt);

// topk_attention over the lists of pq_topk, which are not stored: query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B,
// Hkv, Lk, Dv], codes and what goes with keys as in pq_topk, sink [Hq] -> [B, Hq, Lq, Dv]
TORCHOPS_API at::Tensor pq_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                     const at::Tensor& query_codes, const at::Tensor& key_codes, c10::SymInt k,
                                     bool is_causal = false, std::optional<double> scale = std::nullopt,
                                     c10::SymInt sink_keys = 0, c10::SymInt local_keys = 0,
                                     const std::optional<at::Tensor>& key_bias = std::nullopt,
                                     const std::optional<at::Tensor>& sink = std::nullopt,
                                     const std::optional<at::Tensor>& query_start = std::nullopt,
                                     const std::optional<at::Tensor>& key_start = std::nullopt);

// The same and the logarithm of the softmax's denominator [B, Hq, Lq].
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> pq_attention_lse(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& query_codes,
    const at::Tensor& key_codes, c10::SymInt k, bool is_causal = false, std::optional<double> scale = std::nullopt,
    c10::SymInt sink_keys = 0, c10::SymInt local_keys = 0, const std::optional<at::Tensor>& key_bias = std::nullopt,
    const std::optional<at::Tensor>& sink = std::nullopt, const std::optional<at::Tensor>& query_start = std::nullopt,
    const std::optional<at::Tensor>& key_start = std::nullopt);

// How far rows are from their nearest codewords, and these from what the distances mix of all: input [..., D],
// codebooks [M, E, D / M] -> a number in the accumulation dtype
TORCHOPS_API at::Tensor pq_loss(const at::Tensor& input, const at::Tensor& codebooks);

}  // namespace torchops
