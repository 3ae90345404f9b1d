#pragma once

#include <ATen/core/Tensor.h>

// Codes [rows, K] with at most nnz nonzeros in a row, for which code basis comes close to the weight [rows, cols].

namespace torchops {

// Up to here a code is found by orthogonal matching pursuit, which solves a system for every nonzero of a row.
inline constexpr int64_t few_nonzeros = 16;

// The nnz entries of a row that are largest in magnitude; the others are 0.
at::Tensor keep_largest(const at::Tensor& code, int64_t nnz);

// The squared error of every row.
at::Tensor row_errors(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code);

// The code, with the rows of a fresh one whose error is less, or more by no larger a share than the slack.
at::Tensor better_rows(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code,
                       const at::Tensor& fresh, double slack = 0);

// Of a basis, the atoms have length 1, or are zero.

// A code for a basis that comes without one. No row is worse than zeros.
at::Tensor first_code(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz);

// Another code, from the one there is. Rows of it may be worse.
at::Tensor next_code(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code, int64_t nnz);

// The code with least squares for its nonzeros. No row gets worse.
at::Tensor fitted_code(const at::Tensor& weight, const at::Tensor& basis, const at::Tensor& code, int64_t nnz);

}  // namespace torchops
