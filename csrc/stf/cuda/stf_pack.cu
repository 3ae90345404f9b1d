#include <ATen/ops/empty.h>

#include "core/cuda/launch.h"
#include "core/library.h"
#include "core/tensors.h"
#include "stf/cuda/layout.h"
#include "stf/cuda/pack_factor.cuh"
#include "stf/linear.h"

namespace torchops {
namespace {

// torch's operators, of which the CPU's is composed, would wait for the indices' check here.
std::tuple<at::Tensor, at::Tensor> stf_pack_cuda(const at::Tensor& values, const at::Tensor& indices,
                                                 int64_t basis_size) {
  check_stf_pack(values, indices, basis_size);
  const c10::cuda::CUDAGuard guard(values.device());
  const auto v = values.contiguous(), i = indices.contiguous();
  const auto num_rows = v.size(0), num_blocks = v.size(1), nnz = v.size(2);
  const auto groups = divide_up(num_rows, kernels::stf::rows_per_group);
  auto packed_values = at::empty({groups, num_blocks, kernels::stf::rows_per_group * nnz}, v.options());
  auto mask = at::empty({groups, num_blocks, basis_size}, v.options().dtype(at::kShort));
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::stf::SparseFactor<T> factor{static_cast<const T*>(v.const_data_ptr()),
                                               i.const_data_ptr(),
                                               i.scalar_type() == at::kByte,
                                               num_rows,
                                               num_blocks,
                                               nnz,
                                               basis_size};
    device::launch(
        {groups * num_blocks, kernels::stf::cuda::pack_threads, device::shared_size<int32_t>(device::max_warps)},
        kernels::stf::cuda::pack_factor<T>,
        kernels::stf::cuda::PackFactor<T>{factor, static_cast<T*>(packed_values.mutable_data_ptr()),
                                          static_cast<uint16_t*>(mask.mutable_data_ptr())});
  });
  return {packed_values, mask};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_pack", stf_pack_cuda);
}

}  // namespace torchops
