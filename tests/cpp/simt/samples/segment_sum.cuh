#pragma once

#include "core/cuda/device.cuh"
#include "samples/mutation.h"

namespace torchops::kernels::samples {

inline size_t segment_sum_shared(unsigned threads) {
  return device::shared_size<int64_t>(threads);
}

// output[s] = the sum of rows members[offsets[s]] to members[offsets[s + 1] - 1] of input. A warp does a
// segment, its lanes fetch 32 members at a time for each other.
template <typename T, Mutation mutation = Mutation::none>
__global__ void segment_sum(const T* __restrict__ input,          // [N, C]
                            const int64_t* __restrict__ offsets,  // [S + 1]
                            const int64_t* __restrict__ members,  // [offsets[S]]
                            T* __restrict__ output,               // [S, C]
                            int64_t num_segments, int64_t num_channels) {
  device::SharedMemory shared;
  const int lane = static_cast<int>(threadIdx.x) % device::warp_size;
  const int warp = static_cast<int>(threadIdx.x) / device::warp_size;
  int64_t* fetched = shared.take<int64_t>(blockDim.x) + warp * device::warp_size;
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * (blockDim.x / device::warp_size) + warp;
  if (segment >= num_segments) {
    return;  // the whole warp, and there is no barrier of the block
  }
  const int64_t end = offsets[segment + 1];
  for (int64_t first_channel = 0; first_channel < num_channels; first_channel += device::warp_size) {
    const int64_t channel = first_channel + lane;
    float sum = 0;
    for (int64_t first = offsets[segment]; first < end; first += device::warp_size) {
      const int64_t left = end - first;
      const int count = left < device::warp_size ? static_cast<int>(left) : device::warp_size;
      if (lane < count) {
        fetched[lane] = members[first + lane];
      }
      if (mutation != Mutation::no_syncwarp) {
        device::syncwarp();
      }
      for (int i = 0; i < count && channel < num_channels; ++i) {
        sum += device::widen(input[fetched[i] * num_channels + channel]);
      }
      device::syncwarp();
    }
    if (channel < num_channels) {
      output[segment * num_channels + channel] = device::narrow<T>(sum);
    }
  }
}

}  // namespace torchops::kernels::samples
