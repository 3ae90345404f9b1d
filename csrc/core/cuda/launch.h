#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>  // a host layer begins with a c10::cuda::CUDAGuard
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "core/cuda/grid.h"

namespace torchops::device {

struct LaunchShape {
  Grid grid;
  dim3 block;  // a multiple of 32 threads
  size_t shared_bytes = 0;
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const char* file = __builtin_FILE();  // where the launch is written
};

// Starts a kernel on the current device: launch({grid, block, shared_bytes}, kernel, arguments...).
// An empty grid is no work.
template <typename... Parameters, typename... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const Grid& grid = shape.grid;
  TORCH_CHECK_VALUE(grid.allowed(), grid.error(shape.file));
  if (grid.empty()) {
    return;
  }
  constexpr size_t always_allowed = 48 * 1024;
  if (shape.shared_bytes > always_allowed) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace torchops::device
