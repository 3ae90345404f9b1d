#pragma once

#include "core/cuda/device.cuh"

namespace torchops::kernels::stf::cuda {

// output[i] = bias[i % bias_size], if there is a bias, + the sum of sums[part][i] over the parts in ascending order.
template <typename T>
struct AddParts {
  const accumulate_t<T>* sums;  // [parts][size]
  int64_t num_parts, size;
  T* output;                // [size]
  const T* bias = nullptr;  // [bias_size]
  int64_t bias_size = 1;
};

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
