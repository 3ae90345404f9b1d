#include "core/cuda/launch.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

namespace torchops::device {

cudaStream_t current_stream() {
  return c10::cuda::getCurrentCUDAStream();
}

void check(cudaError_t error) {
  C10_CUDA_CHECK(error);
}

void check(const Grid& grid, const char* file) {
  TORCH_CHECK_VALUE(grid.allowed(), grid.error(file));
}

}  // namespace torchops::device
