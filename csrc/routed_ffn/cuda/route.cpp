#include "routed_ffn/route.h"

#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "routed_ffn/cuda/launches.h"

namespace torchops {
namespace {

std::tuple<at::Tensor, at::Tensor> route_cuda(const at::Tensor& index, int64_t num_blocks) {
  const c10::DeviceGuard guard(index.device());
  return route_by(index, num_blocks, kernels::routed_ffn::launch_route);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("route", route_cuda);
}

}  // namespace torchops
