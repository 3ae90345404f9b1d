#pragma once

#include "core/cuda/device.cuh"
#include "samples/mutation.h"
#include "samples/warp_sum.cuh"

namespace torchops::kernels::samples {

// total[0] += every element, a warp per block. Exact, and so independent of the order, for integers below
// 2^24; other kernels do without atomic additions of floating-point numbers.
template <Mutation mutation = Mutation::none>
__global__ void add_up(const float* __restrict__ input,  // [N]
                       float* total,                     // [1]
                       int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float sum = warp_sum(i < count ? input[i] : 0);
  if (threadIdx.x == 0) {
    if (mutation == Mutation::no_atomic) {
      *total += sum;
    } else {
      device::atomic_add(total, sum);
    }
  }
}

}  // namespace torchops::kernels::samples
