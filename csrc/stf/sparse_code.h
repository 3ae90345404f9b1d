#pragma once

#include <ATen/core/Tensor.h>

// Codes [rows, K] with at most nnz nonzeros in a row, for which code basis comes close to the weight [rows, cols].

namespace torchops {

// Up to here a code is found by orthogonal matching pursuit, which solves a system for every nonzero of a row.
inline constexpr int64_t few_nonzeros = 16;

// The nnz entries of a row that are largest in magnitude; the others are 0.
at::Tensor keep_largest(const at::Tensor& code, int64_t nnz);

// A code for a basis that comes without one.
at::Tensor first_code(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz);

// Another code, from the one there is. Rows of it may be worse.
at::Tensor next_code(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code, int64_t nnz);

}  // namespace torchops
