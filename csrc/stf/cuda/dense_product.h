#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include <optional>

#include "stf/linear.h"

// Products with a sparse factor that is written out as a dense matrix [rows, blocks, K]. Tensors are made contiguous:
// the bits of a dense product depend on the memory layout.

namespace torchops {

// atoms [blocks, T, K] -> [T, rows], with one sum over the atoms of all blocks.
inline at::Tensor dense_atoms_to_rows(const at::Tensor& dense, const at::Tensor& atoms,
                                      const std::optional<at::Tensor>& bias) {
  const auto weight = dense.view({dense.size(0), dense.size(1) * dense.size(2)}).t();
  const auto tokens = join_blocks(atoms.contiguous());
  return bias ? at::addmm(*bias, tokens, weight) : at::mm(tokens, weight);
}

// rows [T, rows] -> [blocks, T, K]
inline at::Tensor dense_rows_to_atoms(const at::Tensor& dense, const at::Tensor& rows) {
  const auto of_blocks = rows.contiguous().unsqueeze(0).expand({dense.size(1), rows.size(0), rows.size(1)});
  return at::bmm(of_blocks, dense.transpose(0, 1));
}

}  // namespace torchops
