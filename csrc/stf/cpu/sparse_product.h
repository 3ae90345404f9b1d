#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/cpu/dense_product.h"

namespace torchops {

// A sparse factor on the CPU (stf/linear.h). Errors name the operator.
struct CpuSparseProduct {
  const char* op;
  const at::Tensor& values;   // [rows, blocks, nnz]
  const at::Tensor& indices;  // [rows, blocks, nnz]
  int64_t basis_size;

  static constexpr auto dense_product = torchops::dense_product;
  at::Tensor atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const;
  at::Tensor rows_to_atoms(const at::Tensor& rows) const;
  at::Tensor value_gradient(const at::Tensor& rows, const at::Tensor& atoms) const;
};

}  // namespace torchops
