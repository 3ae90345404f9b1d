#include "stf/cuda/packed_product.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/cuda/launch.h"
#include "core/tensors.h"
#include "stf/cuda/dense_product.h"
#include "stf/cuda/expand_packed_factor.cuh"
#include "stf/cuda/layout.h"
#include "stf/cuda/packed_atoms_to_rows.cuh"
#include "stf/cuda/packed_atoms_to_rows_mma.cuh"
#include "stf/cuda/packed_rows_to_atoms.cuh"
#include "stf/cuda/packed_rows_to_atoms_mma.cuh"
#include "stf/cuda/product_of_parts.h"
#include "stf/cuda/repair_tokens.cuh"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

using kernels::accumulate_t;

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
  namespace cuda = kernels::stf::cuda;
  const auto num_tokens = atoms.size(1);
  const auto output = at::empty({num_tokens, num_rows}, values.options());
  for_dtype_with_matrix_units(values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto row_tiles = divide_up(num_rows, cuda::packed_tile_rows);
    const auto token_tiles = divide_up(num_tokens, cuda::packed_tile_tokens);
    const Parts parts(mask.size(1) * divide_up(mask.size(2), cuda::packed_gather_tile_columns), 1,
                      row_tiles * token_tiles);
    add_up_parts<T>(output, parts.count, bias, [&](float* sums) {
      device::launch(
          {{row_tiles, token_tiles, parts.count}, cuda::packed_tile_threads, cuda::packed_gather_mma_shared_bytes<T>},
          cuda::packed_atoms_to_rows_mma<T>,
          cuda::PackedAtomsToRowsMma<T>{packed_factor<T>(values, mask, num_rows),
                                        static_cast<const T*>(atoms.const_data_ptr()), sums, num_tokens, parts.size,
                                        has_wide_rows(atoms)});
    });
  });
  return output;
}

// rows [T, rows] -> [blocks, T, K], for some tokens.
at::Tensor rows_to_atoms_mma(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& rows) {
  namespace cuda = kernels::stf::cuda;
  const auto num_tokens = rows.size(0), num_blocks = mask.size(1), basis_size = mask.size(2);
  const auto output = at::empty({num_blocks, num_tokens, basis_size}, values.options());
  for_dtype_with_matrix_units(values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto column_tiles = num_blocks * divide_up(basis_size, cuda::packed_scatter_tile_columns);
    const auto token_tiles = divide_up(num_tokens, cuda::packed_tile_tokens);
    const Parts parts(divide_up(rows.size(1), cuda::packed_tile_rows), 1, column_tiles * token_tiles);
    add_up_parts<T>(output, parts.count, std::nullopt, [&](float* sums) {
      device::launch({{column_tiles, token_tiles, parts.count},
                      cuda::packed_tile_threads,
                      cuda::packed_scatter_mma_shared_bytes<T>},
                     cuda::packed_rows_to_atoms_mma<T>,
                     cuda::PackedRowsToAtomsMma<T>{packed_factor<T>(values, mask, rows.size(1)),
                                                   static_cast<const T*>(rows.const_data_ptr()), sums, num_tokens,
                                                   parts.size, has_wide_rows(rows)});
    });
  });
  return output;
}

}  // namespace

at::Tensor CudaPackedProduct::dense() const {
  const auto v = packed_values.contiguous(), m = mask.contiguous();
  auto result = at::empty({num_rows, m.size(1), m.size(2)}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch({m.size(0) * m.size(1), threads_of_elements, device::shared_size<int32_t>(device::max_warps)},
                   kernels::stf::cuda::expand_packed_factor<T>, packed_factor<T>(v, m, num_rows),
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
      device::launch({num_tokens, kernels::stf::cuda::repair_threads}, kernels::stf::cuda::repair_packed_tokens<T>,
                     kernels::stf::cuda::RepairTokens<T, kernels::stf::PackedFactor>{
                         packed_factor<T>(v, m, num_rows), static_cast<const T*>(a.const_data_ptr()),
                         data_or_null<T>(b), static_cast<T*>(output.mutable_data_ptr()), num_tokens});
    });
    return output;
  }
  auto output = at::empty({num_tokens, num_rows}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_token_tile(num_tokens, [&](auto tokens) {
      device::launch({{m.size(0), divide_up(num_tokens, tokens)},
                      kernels::stf::cuda::packed_gather_threads,
                      kernels::stf::cuda::packed_gather_shared_bytes<T>(tokens)},
                     kernels::stf::cuda::packed_atoms_to_rows<decltype(tokens)::value, T>,
                     kernels::stf::cuda::PackedAtomsToRows<T>{
                         packed_factor<T>(v, m, num_rows), static_cast<const T*>(a.const_data_ptr()),
                         data_or_null<T>(b), static_cast<T*>(output.mutable_data_ptr()), num_tokens});
    });
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
  const auto num_blocks = m.size(1), basis_size = m.size(2);
  auto output = at::empty({num_blocks, num_tokens, basis_size}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_token_tile(num_tokens, [&](auto tokens) {
      using kernels::stf::cuda::packed_columns_of_thread;
      const auto threads = std::min<int64_t>(divide_up(divide_up(basis_size, packed_columns_of_thread), 32) * 32,
                                             kernels::stf::cuda::packed_scatter_most_threads);
      const auto chunks = divide_up(basis_size, threads * packed_columns_of_thread);
      const auto tiles = divide_up(num_tokens, tokens);
      const Parts parts(m.size(0), 1, chunks * num_blocks * tiles);
      add_up_parts<T>(output, parts.count, std::nullopt, [&](accumulate_t<T>* sums) {
        device::launch({{chunks * num_blocks, parts.count, tiles},
                        static_cast<unsigned>(threads),
                        kernels::stf::cuda::packed_scatter_shared_bytes<T>(tokens)},
                       kernels::stf::cuda::packed_rows_to_atoms<decltype(tokens)::value, T>,
                       kernels::stf::cuda::PackedRowsToAtoms<T>{packed_factor<T>(v, m, num_rows),
                                                                static_cast<const T*>(r.const_data_ptr()), sums,
                                                                num_tokens, parts.size});
      });
    });
  });
  return output;
}

}  // namespace torchops
