#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// The sparse factor with its zeros, code [rows, blocks, K], for products with many tokens in bfloat16 and float32.
// Where a CPU multiplies bfloat16 in pairs, a dense product is more than twice as fast as float32's, which sparse ones
// are summed in. In float32 it is faster where a CPU has two 512-bit units, which multiply more than it can read of
// token vectors for single nonzeros: all that have tiles do.

namespace torchops {

bool dense_code_pays(at::ScalarType dtype, int64_t num_tokens);

// values [rows, blocks, nnz] and indices, contiguous, of a dtype that it pays for. Errors name the operator.
at::Tensor dense_code(const char* op, const at::Tensor& values, const at::Tensor& indices, int64_t basis_size);

// The entries of a contiguous code at the indices [rows, blocks, nnz].
at::Tensor take_nonzeros(const char* op, const at::Tensor& code, const at::Tensor& indices);

// The products of stf/linear.h with a contiguous code.
at::Tensor dense_atoms_to_rows(const at::Tensor& code, const at::Tensor& atoms, const std::optional<at::Tensor>& bias);
at::Tensor dense_rows_to_atoms(const at::Tensor& code, const at::Tensor& rows);

}  // namespace torchops
