#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "stf/cuda/sparse_product.h"
#include "stf/linear.h"
#include "stf/stf.h"

namespace torchops {
namespace {

at::Tensor stf_linear_cuda(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& values,
                           const at::Tensor& indices, const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear("stf_linear", input, basis, values, indices, bias, transpose);
  const c10::DeviceGuard guard(input.device());
  return std::get<0>(
      stf_linear_forward(CudaSparseProduct{values, indices, basis.size(1)}, input, basis, bias, transpose));
}

std::tuple<at::Tensor, at::Tensor> stf_linear_with_atoms_cuda(const at::Tensor& input, const at::Tensor& basis,
                                                              const at::Tensor& values, const at::Tensor& indices,
                                                              const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear("_stf_linear_with_atoms", input, basis, values, indices, bias, transpose);
  const c10::DeviceGuard guard(input.device());
  return stf_linear_forward(CudaSparseProduct{values, indices, basis.size(1)}, input, basis, bias, transpose);
}

StfGradients stf_linear_backward_cuda(const StfBackward& args) {
  check_stf_linear_backward(args);
  const c10::DeviceGuard guard(args.grad_output.device());
  const auto values = args.values.value_or(at::Tensor()), indices = args.indices.value_or(at::Tensor());
  return stf_linear_gradients(CudaSparseProduct{values, indices, args.basis_sizes[1].expect_int()}, args);
}

at::Tensor stf_linear_straight_through_cuda(const at::Tensor& input, const at::Tensor& basis, const at::Tensor& latent,
                                            int64_t nnz, const std::optional<at::Tensor>& bias, bool transpose) {
  check_stf_linear_straight_through(input, basis, latent, nnz, bias, transpose);
  const auto [values, indices] = stf_select(latent, nnz);
  return stf_linear_cuda(input, basis, values, indices, bias, transpose);
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_linear", stf_linear_cuda);
  m.impl("_stf_linear_with_atoms", stf_linear_with_atoms_cuda);
  m.impl("_stf_linear_backward", flattened<stf_linear_backward_cuda>);
  m.impl("stf_linear_straight_through", stf_linear_straight_through_cuda);
}

}  // namespace torchops
