#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "core/tensors.h"
#include "stf/cuda/launches.h"
#include "stf/cuda/sparse_product.h"
#include "stf/linear.h"

namespace torchops {
namespace {

std::tuple<at::Tensor, at::Tensor> stf_select_cuda(const at::Tensor& latent, int64_t nnz) {
  check_stf_select(latent, nnz);
  const c10::DeviceGuard guard(latent.device());
  const auto rows = latent.contiguous();
  auto values = at::empty({latent.size(0), latent.size(1), nnz}, latent.options());
  auto indices = at::empty(values.sizes(), latent.options().dtype(index_dtype(latent.size(2))));
  if (nnz == 0) {
    return {values, indices};
  }
  for_dtype(latent.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::stf::cuda::Select<T> args{static_cast<const T*>(rows.const_data_ptr()),
                                             static_cast<T*>(values.mutable_data_ptr()),
                                             indices.mutable_data_ptr(),
                                             indices.scalar_type() == at::kByte,
                                             static_cast<int32_t>(latent.size(2)),
                                             static_cast<int32_t>(nnz)};
    kernels::stf::cuda::launch_select(args, latent.size(0) * latent.size(1));
  });
  return {values, indices};
}

at::Tensor stf_select_backward_cuda(const at::Tensor& grad_values, const at::Tensor& indices, int64_t basis_size) {
  check_stf_select_backward(grad_values, indices, basis_size);
  const c10::DeviceGuard guard(grad_values.device());
  return CudaSparseProduct{"stf_select", grad_values, indices, basis_size}.dense();
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_select", stf_select_cuda);
  m.impl("_stf_select_backward", stf_select_backward_cuda);
}

}  // namespace torchops
