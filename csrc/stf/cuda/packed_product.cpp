#include "stf/cuda/packed_product.h"

#include <ATen/ops/empty.h>

#include "core/tensors.h"
#include "stf/cuda/dense_product.h"
#include "stf/cuda/launches.h"
#include "stf/cuda/layout.h"
#include "stf/cuda/product_of_parts.h"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

// Whether rows of a contiguous matrix can be copied 16 bytes at a time.
bool has_wide_rows(const at::Tensor& matrix) {
  constexpr size_t width = 16;
  return reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % width == 0 &&
         static_cast<size_t>(matrix.size(-1)) * matrix.element_size() % width == 0;
}

bool has_matrix_units(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}
template <typename Body>
void for_dtype_with_matrix_units(at::ScalarType dtype, const Body& body) {
  dtype == at::kHalf ? body(type_tag<kernels::float16>{}) : body(type_tag<kernels::bfloat16>{});
}

// atoms [blocks, T, K] -> [T, rows], for some tokens.
at::Tensor atoms_to_rows_mma(const at::Tensor& values, const at::Tensor& mask, int64_t num_rows,
                             const at::Tensor& atoms, const std::optional<at::Tensor>& bias) {
  const auto num_tokens = atoms.size(1);
  const auto output = at::empty({num_tokens, num_rows}, values.options());
  for_dtype_with_matrix_units(values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_up_parts(
        kernels::stf::cuda::PackedAtomsToRowsMma<T>{packed_factor<T>(values, mask, num_rows),
                                                    static_cast<const T*>(atoms.const_data_ptr()), /*sums=*/nullptr,
                                                    num_tokens, /*part_size=*/0, has_wide_rows(atoms)},
        output, bias);
  });
  return output;
}

// rows [T, rows] -> [blocks, T, K], for some tokens.
at::Tensor rows_to_atoms_mma(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& rows) {
  const auto num_tokens = rows.size(0);
  const auto output = at::empty({mask.size(1), num_tokens, mask.size(2)}, values.options());
  for_dtype_with_matrix_units(values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_up_parts(
        kernels::stf::cuda::PackedRowsToAtomsMma<T>{packed_factor<T>(values, mask, rows.size(1)),
                                                    static_cast<const T*>(rows.const_data_ptr()), /*sums=*/nullptr,
                                                    num_tokens, /*part_size=*/0, has_wide_rows(rows)},
        output, std::nullopt);
  });
  return output;
}

}  // namespace

at::Tensor CudaPackedProduct::dense() const {
  const auto v = packed_values.contiguous(), m = mask.contiguous();
  auto result = at::empty({num_rows, m.size(1), m.size(2)}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::stf::cuda::launch_expand_packed_factor(packed_factor<T>(v, m, num_rows),
                                                    static_cast<T*>(result.mutable_data_ptr()));
  });
  return result;
}

at::Tensor CudaPackedProduct::atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const {
  const auto num_tokens = atoms.size(1);
  const auto v = packed_values.contiguous(), m = mask.contiguous(), a = atoms.contiguous();
  const auto b = bias ? std::optional(bias->contiguous()) : std::nullopt;
  if (num_tokens > few_tokens) {
    auto output = has_matrix_units(v.scalar_type()) && num_tokens <= some_tokens
                      ? atoms_to_rows_mma(v, m, num_rows, a, b)
                      : dense_atoms_to_rows(dense(), a, b);
    for_dtype(v.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      kernels::stf::cuda::launch_repair_tokens(kernels::stf::cuda::RepairTokens<T, kernels::stf::PackedFactor>{
          packed_factor<T>(v, m, num_rows), static_cast<const T*>(a.const_data_ptr()), data_or_null<T>(b),
          static_cast<T*>(output.mutable_data_ptr()), num_tokens});
    });
    return output;
  }
  auto output = at::empty({num_tokens, num_rows}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    kernels::stf::cuda::launch_packed_atoms_to_rows(kernels::stf::cuda::PackedAtomsToRows<T>{
        packed_factor<T>(v, m, num_rows), static_cast<const T*>(a.const_data_ptr()), data_or_null<T>(b),
        static_cast<T*>(output.mutable_data_ptr()), num_tokens});
  });
  return output;
}

at::Tensor CudaPackedProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto num_tokens = rows.size(0);
  if (num_tokens > (has_matrix_units(rows.scalar_type()) ? some_tokens : few_tokens)) {
    return dense_rows_to_atoms(dense(), rows);
  }
  const auto v = packed_values.contiguous(), m = mask.contiguous(), r = rows.contiguous();
  if (num_tokens > few_tokens) {
    return rows_to_atoms_mma(v, m, r);
  }
  auto output = at::empty({m.size(1), num_tokens, m.size(2)}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    add_up_parts(kernels::stf::cuda::PackedRowsToAtoms<T>{packed_factor<T>(v, m, num_rows),
                                                          static_cast<const T*>(r.const_data_ptr()), /*sums=*/nullptr,
                                                          num_tokens, /*part_size=*/0},
                 output, std::nullopt);
  });
  return output;
}

}  // namespace torchops
