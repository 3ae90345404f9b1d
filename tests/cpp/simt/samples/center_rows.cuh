#pragma once

#include "core/cuda/device.cuh"
#include "samples/mutation.h"
#include "samples/warp_sum.cuh"

namespace torchops::kernels::samples {

// Shared memory of center_rows.
inline size_t center_rows_shared(unsigned threads) {
  return device::shared_size<float>(threads / device::warp_size);
}

// output = input - the row's mean. A block does a row.
template <typename T, Mutation mutation = Mutation::none>
__global__ void center_rows(const T* __restrict__ input,  // [R, C]
                            T* __restrict__ output,       // [R, C]
                            int64_t num_columns) {
  const int num_warps = static_cast<int>(blockDim.x) / device::warp_size;
  device::SharedMemory shared;
  auto* warp_sums = shared.take<float>(num_warps);

  input += blockIdx.x * num_columns;
  output += blockIdx.x * num_columns;
  if (mutation == Mutation::early_return && threadIdx.x >= num_columns) {
    return;
  }
  float sum = 0;
  for (int64_t column = threadIdx.x; column < num_columns; column += blockDim.x) {
    sum += device::widen(device::ldg(input + column));
    if (mutation == Mutation::partial_shuffle) {
      sum = device::shuffle(sum, 0);
    }
  }
  sum = warp_sum(sum);
  if constexpr (mutation == Mutation::misaligned) {
    sum += 0 * device::ldg(reinterpret_cast<const float2*>(input + 1)).x;
  }
  if (threadIdx.x % device::warp_size == 0 || mutation == Mutation::harmless_race) {
    warp_sums[threadIdx.x / device::warp_size + (mutation == Mutation::shared_overrun ? 1 : 0)] = sum;
  }
  if (mutation == Mutation::divergent_barrier) {
    if (threadIdx.x < num_columns) {
      device::syncthreads();
    }
  } else if (mutation != Mutation::no_barrier) {
    device::syncthreads();
  }
  float total = 0;
  for (int warp = 0; warp < num_warps; ++warp) {
    total += warp_sums[warp];
  }
  const float mean = total / static_cast<float>(num_columns);
  for (int64_t column = threadIdx.x; column < num_columns; column += blockDim.x) {
    output[column] = device::narrow<T>(device::widen(input[column]) - mean);
  }
}

}  // namespace torchops::kernels::samples
