#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../core/export.h"

// Pruning, merging and routing of tokens. An assignment [B, N] (int64) says for each of N tokens to
// which of M groups it goes, or -1 when it is dropped. An operator either makes an assignment, or
// moves data along one. docs/tokens.md has the mathematics.

namespace torchops {

// Number of groups that bipartite_assignment makes of num_tokens tokens: num_tokens less r, where r is
// clamped to half of the tokens behind the protected ones.
TORCHOPS_API c10::SymInt num_groups(c10::SymInt num_tokens, c10::SymInt r, c10::SymInt num_protected = 0);

// ---- making an assignment (no gradient) ---------------------------------------------------------

// metric [B, N, K], padding_mask bool [B, N] -> [B, N]
TORCHOPS_API at::Tensor bipartite_assignment(const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected = 0,
                                             const std::optional<at::Tensor>& padding_mask = std::nullopt);

// metric [B, N, K], padding_mask bool [B, N] -> sources [B, R], destinations [B, R]
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> bipartite_pairs(
    const at::Tensor& metric, c10::SymInt r, c10::SymInt num_protected = 0,
    const std::optional<at::Tensor>& padding_mask = std::nullopt);

// scores [B, N], padding_mask bool [B, N] -> [B, N]
TORCHOPS_API at::Tensor topk_assignment(const at::Tensor& scores, c10::SymInt k, c10::SymInt num_protected = 0,
                                        bool fuse = false,
                                        const std::optional<at::Tensor>& padding_mask = std::nullopt);

// ---- moving data along an assignment (differentiable) -------------------------------------------

// input [B, N, C], assign [B, N], weight [B, N] -> merged [B, M, C], total [B, M]
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> merge_tokens(const at::Tensor& input, const at::Tensor& assign,
                                                             c10::SymInt num_groups,
                                                             const std::optional<at::Tensor>& weight = std::nullopt,
                                                             bool normalize = true);

// merged [B, M, C], assign [B, N], residual [B, N, C] -> [B, N, C]
TORCHOPS_API at::Tensor unmerge_tokens(const at::Tensor& merged, const at::Tensor& assign,
                                       const std::optional<at::Tensor>& residual = std::nullopt);

}  // namespace torchops
