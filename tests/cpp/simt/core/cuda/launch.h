#pragma once

#include <cstddef>
#include <tuple>

#include "core/cuda/grid.h"
#include "engine/async_copies.h"
#include "engine/scheduler.h"

// csrc/core/cuda/launch.h for g++: the kernel has run when launch returns.

namespace torchops::device {

struct LaunchShape {
  Grid grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  const char* file = __builtin_FILE();
};

template <typename... Parameters, typename... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const Grid& grid = shape.grid;
  if (!grid.allowed()) {
    throw simt::Error(grid.error(shape.file));
  }
  if (grid.empty()) {
    return;
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call = {kernel, {arguments...}};
  const auto thread = [](const void* argument) {
    const auto* to_call = static_cast<const Call*>(argument);
    std::apply(to_call->kernel, to_call->arguments);
    // Copies that nobody waited for take place all the same.
    for (simt::AsyncCopy copy; simt::take_any(&copy);) {
      simt::carry_out(copy);
    }
  };
  simt::run({.grid = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)),
             .block = shape.block,
             .shared_bytes = shape.shared_bytes,
             .thread = thread,
             .argument = &call});
}

}  // namespace torchops::device
