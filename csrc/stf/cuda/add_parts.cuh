#pragma once

#include "core/cuda/device.cuh"

namespace torchops::kernels::stf::cuda {

// output[i] = the sum of sums[part][i] over the parts in ascending order. A thread per element.
template <typename T>
__global__ void add_parts(const accumulate_t<T>* sums, T* output, int64_t size, int64_t num_parts) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) {
    return;
  }
  accumulate_t<T> sum = 0;
  for (int64_t part = 0; part < num_parts; ++part) {
    sum += sums[part * size + i];
  }
  output[i] = device::narrow<T>(sum);
}

}  // namespace torchops::kernels::stf::cuda
