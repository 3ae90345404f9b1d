#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "stf/linear.h"

namespace torchops {

// A packed sparse factor on CUDA (stf/linear.h). A mask with more bits than there are values has zeros for the rest.
struct CudaPackedProduct {
  const at::Tensor& packed_values;  // [groups, blocks, 16 * nnz]
  const at::Tensor& mask;           // [groups, blocks, K]
  int64_t num_rows;

  static constexpr auto dense_product = product_by_torch;
  at::Tensor atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const;
  at::Tensor rows_to_atoms(const at::Tensor& rows) const;

  // [rows, blocks, K]
  at::Tensor dense() const;
};

}  // namespace torchops
