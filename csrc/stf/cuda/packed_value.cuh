#pragma once

#include "core/cuda/device.cuh"
#include "stf/packed_factor.h"

namespace torchops::kernels::stf::cuda {

// The value of a bit of a mask of a group and block: `at` is the number of bits before it. More bits than there are
// values stop a debug build, and are zeros in a release build.
template <typename T>
__device__ __forceinline__ T packed_value(const PackedFactor<T>& factor, const T* values, int64_t at) {
  const bool has_value = at < rows_per_group * factor.nnz;
  device::debug_assert(has_value, "a mask has as many bits as there are values");
  return has_value ? values[at] : T{};
}

}  // namespace torchops::kernels::stf::cuda
