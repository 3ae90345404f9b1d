#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "stf/cuda/packed_product.h"
#include "stf/linear.h"

namespace torchops {
namespace {

at::Tensor stf_linear_packed_cuda(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                                  const at::Tensor& mask, int64_t rows, const std::optional<at::Tensor>& bias,
                                  bool transpose) {
  check_stf_linear_packed(input, basis, packed_values, mask, rows, bias, transpose);
  const c10::DeviceGuard guard(input.device());
  return std::get<0>(stf_linear_forward(CudaPackedProduct{packed_values, mask, rows}, input, basis, bias, transpose));
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_linear_packed", stf_linear_packed_cuda);
}

}  // namespace torchops
