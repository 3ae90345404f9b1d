#pragma once

#include "core/cuda/device.cuh"

namespace torchops::kernels::tokens {

// The group of a token, or -1 where it is dropped. Nobody looked at an assignment before it came here: a
// value outside of -1..num_groups-1 stops a debug build, and drops the token in a release build, so that
// no address is ever made of it.
__device__ __forceinline__ int64_t assigned_group(int64_t value, int64_t num_groups) {
  device::debug_assert(-1 <= value && value < num_groups, "an assignment is in -1..num_groups-1");
  return 0 <= value && value < num_groups ? value : -1;
}

}  // namespace torchops::kernels::tokens
