#pragma once

#include "core/cuda/device.cuh"

namespace torchops::kernels::samples {

// In every lane.
__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = device::warp_size / 2; distance > 0; distance /= 2) {
    value += device::shuffle_xor(value, distance);
  }
  return value;
}

}  // namespace torchops::kernels::samples
