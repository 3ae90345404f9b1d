#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/cpu/dense_product.h"

namespace torchops {

// A packed sparse factor on the CPU (stf/linear.h).
struct CpuPackedProduct {
  const at::Tensor& packed_values;  // [groups, blocks, 16 * nnz]
  const at::Tensor& mask;           // [groups, blocks, K]
  int64_t num_rows;

  static constexpr auto dense_product = torchops::dense_product;
  at::Tensor atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const;
  at::Tensor rows_to_atoms(const at::Tensor& rows) const;
};

}  // namespace torchops
