#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "core/cuda/grid.h"

namespace torchops::device {

// What a launch takes of torch, whose headers cost nvcc a minute a file.
cudaStream_t current_stream();
void check(cudaError_t error);
void check(const Grid& grid, const char* file);

struct LaunchShape {
  Grid grid;
  dim3 block;  // a multiple of 32 threads
  size_t shared_bytes = 0;
  cudaStream_t stream = current_stream();
  const char* file = __builtin_FILE();  // where the launch is written
};

// Starts a kernel on the current device: launch({grid, block, shared_bytes}, kernel, arguments...).
// An empty grid is no work.
template <typename... Parameters, typename... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const Grid& grid = shape.grid;
  check(grid, shape.file);
  if (grid.empty()) {
    return;
  }
  constexpr size_t always_allowed = 48 * 1024;
  if (shape.shared_bytes > always_allowed) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace torchops::device
