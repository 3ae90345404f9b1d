#include "stf/cuda/sparse_product.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include "core/tensors.h"
#include "stf/cuda/dense_product.h"
#include "stf/cuda/launches.h"
#include "stf/cuda/layout.h"
#include "stf/cuda/product_of_parts.h"
#include "stf/tensor_factors.h"

namespace torchops {

at::Tensor CudaSparseProduct::dense() const {
  const auto v = values.contiguous(), i = indices.contiguous();
  auto result = at::empty({v.size(0), v.size(1), basis_size}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::stf::cuda::launch_expand_factor(sparse_factor<T>(v, i, basis_size),
                                             static_cast<T*>(result.mutable_data_ptr()));
  });
  return result;
}

at::Tensor CudaSparseProduct::atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const {
  const auto num_tokens = atoms.size(1);
  const auto v = values.contiguous(), i = indices.contiguous(), a = atoms.contiguous();
  const auto b = bias ? bias->contiguous() : at::Tensor();
  if (num_tokens > few_tokens) {
    auto output = dense_atoms_to_rows(dense(), a, bias);
    for_dtype(v.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      kernels::stf::cuda::launch_repair_tokens(kernels::stf::cuda::RepairTokens<T, kernels::stf::SparseFactor>{
          sparse_factor<T>(v, i, basis_size), static_cast<const T*>(a.const_data_ptr()), data_or_null<T>(b),
          static_cast<T*>(output.mutable_data_ptr()), num_tokens});
    });
    return output;
  }
  auto output = at::empty({num_tokens, v.size(0)}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::stf::cuda::launch_atoms_to_rows(kernels::stf::cuda::AtomsToRows<T>{
        sparse_factor<T>(v, i, basis_size), static_cast<const T*>(a.const_data_ptr()), data_or_null<T>(b),
        static_cast<T*>(output.mutable_data_ptr()), num_tokens});
  });
  return output;
}

at::Tensor CudaSparseProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto num_tokens = rows.size(0);
  if (num_tokens > few_tokens) {
    return dense_rows_to_atoms(dense(), rows);
  }
  const auto v = values.contiguous(), i = indices.contiguous(), r = rows.contiguous();
  auto output = at::empty({v.size(1), num_tokens, basis_size}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_up_parts(kernels::stf::cuda::RowsToAtoms<T>{sparse_factor<T>(v, i, basis_size),
                                                    static_cast<const T*>(r.const_data_ptr()), /*sums=*/nullptr,
                                                    num_tokens, /*part_size=*/0},
                 output, std::nullopt);
  });
  return output;
}

at::Tensor CudaSparseProduct::value_gradient(const at::Tensor& rows, const at::Tensor& atoms) const {
  const auto num_tokens = rows.size(0);
  const auto i = indices.contiguous(), r = rows.contiguous(), a = atoms.contiguous();
  auto grad_values = at::empty(i.sizes(), rows.options());
  if (num_tokens > few_tokens) {
    const auto grad = at::bmm(r.t().unsqueeze(0).expand({i.size(1), i.size(0), num_tokens}), a);
    for_dtype(rows.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      kernels::stf::cuda::launch_take_nonzeros(sparse_factor<T>({}, i, basis_size),
                                               static_cast<const T*>(grad.const_data_ptr()),
                                               static_cast<T*>(grad_values.mutable_data_ptr()));
    });
    return grad_values;
  }
  for_dtype(rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::stf::cuda::launch_value_gradient(kernels::stf::cuda::ValueGradient<T>{
        sparse_factor<T>({}, i, basis_size), static_cast<const T*>(r.const_data_ptr()),
        static_cast<const T*>(a.const_data_ptr()), static_cast<T*>(grad_values.mutable_data_ptr()), num_tokens});
  });
  return grad_values;
}

}  // namespace torchops
