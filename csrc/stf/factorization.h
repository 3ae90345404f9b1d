#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "stf/sparse_code.h"

// Factorizations W = code basis with nnz nonzeros in a row of the code, composed of torch's operators on any device.

namespace torchops {

// A ValueError that names op and tensor where there is a NaN or an infinity.
void check_finite(const char* op, const char* name, const at::Tensor& tensor);

// One block: basis [K, c], and the code [rows, K] with at most nnz nonzeros in a row.
struct Factorization {
  at::Tensor basis;
  at::Tensor code;
};

// The same product with atoms of length 1.
Factorization with_unit_atoms(const Factorization& f);

double largest_number(at::ScalarType dtype);

// The largest magnitude of a weight, or 1 if there is none: what weights are divided by before they are factored, for
// squares of large and of small numbers are no numbers.
at::Tensor scale_of(const at::Tensor& weight);

// The factorization of the weight times the scale, whose code dtype can hold: a row that is longer than the largest
// number makes atoms longer, by a power of 2.
Factorization scaled(const Factorization& f, const at::Tensor& scale, at::ScalarType dtype);

// From several starts, the best one refined up to num_iterations times. The error never rises from one iteration to
// the next.
Factorization factorize(const Target& target, int64_t basis_size, int64_t nnz, int64_t num_iterations);

// The code for a basis, and both refined up to num_iterations times: without an iteration the basis is the given one,
// else its atoms have length 1.
Factorization factorize_from(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz, int64_t num_iterations);

// stf_factorize, stf_project and _stf_project_to_factors on every device.
std::tuple<at::Tensor, at::Tensor, at::Tensor> factorize_weight(const at::Tensor& weight, int64_t basis_size,
                                                                int64_t nnz, const std::optional<at::Tensor>& gram,
                                                                const std::optional<at::Tensor>& row_gram,
                                                                int64_t num_blocks, int64_t num_iterations);
std::tuple<at::Tensor, at::Tensor> project_weight(const at::Tensor& weight, const at::Tensor& basis, int64_t nnz,
                                                  int64_t num_iterations);
std::tuple<at::Tensor, at::Tensor, at::Tensor> project_weight_to_factors(const at::Tensor& weight,
                                                                         const at::Tensor& basis, int64_t nnz,
                                                                         int64_t num_iterations);

}  // namespace torchops
