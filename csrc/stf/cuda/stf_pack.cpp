#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "core/tensors.h"
#include "stf/cuda/launches.h"
#include "stf/cuda/layout.h"
#include "stf/linear.h"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

// torch's operators, of which the CPU's is composed, would wait for the indices' check here.
std::tuple<at::Tensor, at::Tensor> stf_pack_cuda(const at::Tensor& values, const at::Tensor& indices,
                                                 int64_t basis_size) {
  check_stf_pack(values, indices, basis_size);
  const c10::DeviceGuard guard(values.device());
  const auto v = values.contiguous(), i = indices.contiguous();
  const auto groups = divide_up(v.size(0), kernels::stf::rows_per_group), num_blocks = v.size(1);
  auto packed_values = at::empty({groups, num_blocks, kernels::stf::rows_per_group * v.size(2)}, v.options());
  auto mask = at::empty({groups, num_blocks, basis_size}, v.options().dtype(at::kShort));
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::stf::cuda::launch_pack_factor(kernels::stf::cuda::PackFactor<T>{
        sparse_factor<T>(v, i, basis_size), static_cast<T*>(packed_values.mutable_data_ptr()),
        static_cast<uint16_t*>(mask.mutable_data_ptr())});
  });
  return {packed_values, mask};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_pack", stf_pack_cuda);
}

}  // namespace torchops
