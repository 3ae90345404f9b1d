
#include "core/library.h"
#include "stf/cpu/packed_product.h"
#include "stf/linear.h"

namespace torchops {
namespace {

at::Tensor stf_linear_packed_cpu(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& packed_values,
                                 const at::Tensor& mask, int64_t rows, const std::optional<at::Tensor>& bias,
                                 bool transpose) {
  check_stf_linear_packed(input, basis, packed_values, mask, rows, bias, transpose);
  return std::get<0>(stf_linear_forward(CpuPackedProduct{packed_values, mask, rows}, input, basis, bias, transpose));
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("stf_linear_packed", stf_linear_packed_cpu);
}

}  // namespace torchops
