#pragma once

#include <ATen/core/Tensor.h>

// The sparse factor with its zeros, for products with many tokens in bfloat16: where a CPU multiplies it in pairs, a
// dense product is more than twice as fast as float32's, which sparse ones are summed in.

namespace torchops {

bool dense_code_pays(at::ScalarType dtype, int64_t num_tokens);

// values [rows, blocks, nnz] and indices, contiguous, in bfloat16 -> [rows, blocks, K]. Errors name the operator.
at::Tensor dense_code(const char* op, const at::Tensor& values, const at::Tensor& indices, int64_t basis_size);

// code [rows, blocks, K] in bfloat16, contiguous -> [rows, blocks, nnz], the entries at the indices.
at::Tensor take_nonzeros(const char* op, const at::Tensor& code, const at::Tensor& indices);

}  // namespace torchops
