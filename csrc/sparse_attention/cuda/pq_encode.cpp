#include "sparse_attention/pq_encode.h"

#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

at::Tensor pq_encode_cuda(const at::Tensor& input, const at::Tensor& codebooks) {
  const c10::DeviceGuard guard(input.device());
  return pq_encode_on_device(input, codebooks,
                             [](const auto& args) { kernels::sparse_attention::launch_nearest_codeword(args); });
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("pq_encode", pq_encode_cuda);
}

}  // namespace torchops
