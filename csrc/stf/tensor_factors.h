#pragma once

#include <ATen/core/Tensor.h>

#include "core/tensors.h"
#include "stf/packed_factor.h"
#include "stf/sparse_factor.h"

// What kernels take, of contiguous tensors.

namespace torchops {

template <typename T>
kernels::stf::SparseFactor<T> sparse_factor(const at::Tensor& values, const at::Tensor& indices, int64_t basis_size) {
  return {data_or_null<T>(values),
          indices.const_data_ptr(),
          indices.scalar_type() == at::kByte,
          indices.size(0),
          indices.size(1),
          indices.size(2),
          basis_size};
}

template <typename T>
kernels::stf::PackedFactor<T> packed_factor(const at::Tensor& packed_values, const at::Tensor& mask, int64_t num_rows) {
  return {static_cast<const T*>(packed_values.const_data_ptr()),
          static_cast<const uint16_t*>(mask.const_data_ptr()),
          num_rows,
          mask.size(1),
          packed_values.size(2) / kernels::stf::rows_per_group,
          mask.size(2)};
}

}  // namespace torchops
