#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// Codes [rows, K] with at most nnz nonzeros in a row, for which code basis comes close to the weight [rows, cols].

namespace torchops {

// Up to here a code is found by orthogonal matching pursuit, which solves a system for every nonzero of a row.
inline constexpr int64_t few_nonzeros = 16;

// What is factored, and what an error costs: its square R R^T of each row R alone or, with a row_gram [rows, rows],
// tr(R^T row_gram R) of all rows R together. One of them then makes up for another.
struct Target {
  at::Tensor weight;
  std::optional<at::Tensor> row_gram;

  // row_gram times a matrix of as many rows.
  at::Tensor weighed(const at::Tensor& rows) const;
};

// The nnz entries of a row that are largest in magnitude; the others are 0.
at::Tensor keep_largest(const at::Tensor& code, int64_t nnz);

// The squared error of code basis.
double total_error(const Target& target, const at::Tensor& basis, const at::Tensor& code);

// The code, with the rows of a fresh one whose error is less, or more by no larger a share than the slack. Of rows that
// count together, it is all or none.
at::Tensor better_rows(const Target& target, const at::Tensor& basis, const at::Tensor& code, const at::Tensor& fresh,
                       double slack = 0);

// Of a basis, the atoms have length 1, or are zero.

// A code for a basis that comes without one, each row by itself. No row is worse than zeros.
at::Tensor first_code(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz);

// Another code, from the one there is. Rows of it may be worse.
at::Tensor next_code(const Target& target, const at::Tensor& basis, const at::Tensor& code, int64_t nnz);

// The code with least squares for its nonzeros. No row gets worse.
at::Tensor fitted_code(const Target& target, const at::Tensor& basis, const at::Tensor& code, int64_t nnz);

}  // namespace torchops
