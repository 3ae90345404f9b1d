#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "stf/cpu/wrong_index.h"

// Products with a packed factor in bfloat16 on tiles, of contiguous values and masks. Wrong masks are found on the way.

namespace torchops {

// Whether tiles multiply so many tokens.
bool tiles_multiply_packed(at::ScalarType dtype, int64_t num_tokens);

// atoms [blocks, T, K] -> [T, rows]
at::Tensor tile_atoms_to_rows(const at::Tensor& packed_values, const at::Tensor& mask, int64_t num_rows,
                              const at::Tensor& atoms, const std::optional<at::Tensor>& bias, WrongIndex& wrong);
// rows [T, rows] -> [blocks, T, K]
at::Tensor tile_rows_to_atoms(const at::Tensor& packed_values, const at::Tensor& mask, const at::Tensor& rows,
                              WrongIndex& wrong);

}  // namespace torchops
