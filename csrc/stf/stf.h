#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../core/export.h"

// Linear layers whose weight is a sparse factor times a small dense basis (DSFormer). docs/stf.md has the
// mathematics.

namespace torchops {

// input [..., in], basis [blocks, K, cols / blocks], values [rows, blocks, nnz], indices uint8 or int16 like values,
// bias [out] -> [..., out]. in = cols and out = rows, or with transpose the other way round.
TORCHOPS_API at::Tensor stf_linear(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                                   const at::Tensor& indices, const std::optional<at::Tensor>& bias = std::nullopt,
                                   bool transpose = false);

// latent [rows, blocks, K], of which the nnz largest in magnitude of every row and block count.
TORCHOPS_API at::Tensor stf_linear_straight_through(const at::Tensor& input, const at::Tensor& basis,
                                                    const at::Tensor& latent, c10::SymInt nnz,
                                                    const std::optional<at::Tensor>& bias = std::nullopt,
                                                    bool transpose = false);

// latent [rows, blocks, K] -> values [rows, blocks, nnz], indices like values
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> stf_select(const at::Tensor& latent, c10::SymInt nnz);

// The layout that inference keeps and files hold: rows in groups of 16, where bit r of mask [groups, blocks, K] says
// that row r of the group has the column, and packed_values [groups, blocks, 16 * nnz] are in the order of columns and
// then rows. Rows that complete the last group have zeros at columns 0..nnz-1.
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> stf_pack(const at::Tensor& values, const at::Tensor& indices,
                                                         c10::SymInt basis_size);

TORCHOPS_API at::Tensor stf_linear_packed(const at::Tensor& input, const at::Tensor& basis,
                                          const at::Tensor& packed_values, const at::Tensor& mask, c10::SymInt rows,
                                          const std::optional<at::Tensor>& bias = std::nullopt, bool transpose = false);

// weight [rows, cols] -> basis [blocks, K, cols / blocks], values and indices [rows, blocks, nnz]. gram [cols, cols] is
// X^T X of the layer's inputs: with it the error of the outputs counts.
TORCHOPS_API std::tuple<at::Tensor, at::Tensor, at::Tensor> stf_factorize(
    const at::Tensor& weight, c10::SymInt basis_size, c10::SymInt nnz, c10::SymInt num_blocks = 1,
    c10::SymInt num_iterations = 20, const std::optional<at::Tensor>& gram = std::nullopt,
    const std::optional<at::Tensor>& row_gram = std::nullopt);

// The value [rows, cols] of the factorization that the basis leads to, and the refined basis. The gradient to the
// projection is that to the weight.
TORCHOPS_API std::tuple<at::Tensor, at::Tensor> stf_project(const at::Tensor& weight, const at::Tensor& basis,
                                                            c10::SymInt nnz, c10::SymInt num_iterations = 1);

}  // namespace torchops
