#include "stf/cuda/packed_product.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/cuda/launch.h"
#include "core/tensors.h"
#include "stf/cuda/add_parts.cuh"
#include "stf/cuda/dense_product.h"
#include "stf/cuda/expand_packed_factor.cuh"
#include "stf/cuda/few_tokens.h"
#include "stf/cuda/packed_atoms_to_rows.cuh"
#include "stf/cuda/packed_rows_to_atoms.cuh"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

using kernels::accumulate_t;

constexpr unsigned threads_of_elements = 256;

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
  if (num_tokens > few_tokens) {
    return dense_atoms_to_rows(dense(), atoms, bias);
  }
  const auto v = packed_values.contiguous(), m = mask.contiguous(), a = atoms.contiguous();
  const auto b = bias ? bias->contiguous() : at::Tensor();
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
                         b.defined() ? static_cast<const T*>(b.const_data_ptr()) : nullptr,
                         static_cast<T*>(output.mutable_data_ptr()), num_tokens});
    });
  });
  return output;
}

at::Tensor CudaPackedProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto num_tokens = rows.size(0);
  if (num_tokens > few_tokens) {
    return dense_rows_to_atoms(dense(), rows);
  }
  const auto v = packed_values.contiguous(), m = mask.contiguous(), r = rows.contiguous();
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
      const auto sums = at::empty({parts.count, output.numel()}, v.options().dtype(at::toOpMathType(v.scalar_type())));
      device::launch({{chunks * num_blocks, parts.count, tiles},
                      static_cast<unsigned>(threads),
                      kernels::stf::cuda::packed_scatter_shared_bytes<T>(tokens)},
                     kernels::stf::cuda::packed_rows_to_atoms<decltype(tokens)::value, T>,
                     kernels::stf::cuda::PackedRowsToAtoms<T>{
                         packed_factor<T>(v, m, num_rows), static_cast<const T*>(r.const_data_ptr()),
                         sums.template mutable_data_ptr<accumulate_t<T>>(), num_tokens, parts.size});
      device::launch({divide_up(output.numel(), threads_of_elements), threads_of_elements},
                     kernels::stf::cuda::add_parts<T>, sums.template const_data_ptr<accumulate_t<T>>(),
                     static_cast<T*>(output.mutable_data_ptr()), output.numel(), parts.count);
    });
  });
  return output;
}

}  // namespace torchops
