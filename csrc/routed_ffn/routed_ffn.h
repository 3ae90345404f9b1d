#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../core/export.h"

// Routed feed-forward layers (SPT), and experts of mixtures: a router chooses for every token which blocks of weights
// compute it. docs/routed_ffn.md has the mathematics.

namespace torchops {

// index int32 or int64 [T, k] -> order int32 [T k], the flat positions of index sorted by block, stable; offsets int32
// [num_blocks + 1]. Entries that name no block come last, behind the last offset.
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& index, c10::SymInt num_blocks);

// Rows that are sorted by block, each times the weight of its block. input [T, K], the row of a token for each of its
// `slots` choices, or without slots [M, K]; weight [G, N, K], order int32 [M], offsets int32 [G + 1], bias [G, N] ->
// [M, N]
TORCHOPS_API at::Tensor grouped_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& order,
                                       const at::Tensor& offsets, const std::optional<at::Tensor>& bias = std::nullopt,
                                       std::optional<int64_t> slots = std::nullopt);

// A feed-forward layer of G blocks, of which each token is computed by those that index names. input [..., d], index
// int32 or int64 [..., k], gate [..., k], w1 [G, N1, d], w2 [G, d, N] -> [..., d]
TORCHOPS_API at::Tensor routed_ffn(
    const at::Tensor& input, const at::Tensor& index, const std::optional<at::Tensor>& gate, const at::Tensor& w1,
    const at::Tensor& w2, const std::optional<at::Tensor>& b1 = std::nullopt,
    const std::optional<at::Tensor>& b2 = std::nullopt, const std::optional<at::Tensor>& w_gate = std::nullopt,
    const std::optional<at::Tensor>& lora_a1 = std::nullopt, const std::optional<at::Tensor>& lora_b1 = std::nullopt,
    const std::optional<at::Tensor>& lora_a2 = std::nullopt, const std::optional<at::Tensor>& lora_b2 = std::nullopt,
    std::string_view activation = "relu", std::string_view glu = "none", double alpha = 1,
    std::optional<double> limit = std::nullopt, double up_offset = 0, std::string_view gate_at = "output",
    double lora_scale = 1, bool recompute = false);

}  // namespace torchops
