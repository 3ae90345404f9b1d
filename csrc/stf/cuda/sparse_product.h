#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "stf/linear.h"

namespace torchops {

// A sparse factor on CUDA (stf/linear.h). An index out of range counts as a nonzero that is zero.
struct CudaSparseProduct {
  const char* op;             // as on the CPU, though nothing is raised here
  const at::Tensor& values;   // [rows, blocks, nnz]
  const at::Tensor& indices;  // [rows, blocks, nnz]
  int64_t basis_size;

  static constexpr auto dense_product = product_by_torch;
  at::Tensor atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const;
  at::Tensor rows_to_atoms(const at::Tensor& rows) const;
  at::Tensor value_gradient(const at::Tensor& rows, const at::Tensor& atoms) const;

  // [rows, blocks, K]
  at::Tensor dense() const;
};

}  // namespace torchops
