#pragma once

#include "core/cuda/device.cuh"
#include "stf/sparse_factor.h"

namespace torchops::kernels::stf::cuda {

// The column of the nonzero at a position. Nobody looked at an index before it came here: one that is out of range
// stops a debug build, and is -1 in a release build, where its nonzero counts as zero and no address is ever made of
// it.
template <typename T>
__device__ __forceinline__ int64_t column_of_nonzero(const SparseFactor<T>& factor, int64_t at) {
  const int64_t index = factor.index(at);
  device::debug_assert(index < factor.basis_size, "an index is in 0..K-1");
  return index < factor.basis_size ? index : -1;
}

}  // namespace torchops::kernels::stf::cuda
