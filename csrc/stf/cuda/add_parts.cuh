#pragma once

#include "core/cuda/device.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

// A thread per element.
template <typename T>
__global__ void add_parts(AddParts<T> args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.size) {
    return;
  }
  accumulate_t<T> sum = 0;
  for (int64_t part = 0; part < args.num_parts; ++part) {
    sum += args.sums[part * args.size + i];
  }
  if (args.bias != nullptr) {
    sum += device::widen(args.bias[i % args.bias_size]);
  }
  args.output[i] = device::narrow<T>(sum);
}

}  // namespace torchops::kernels::stf::cuda
