#include "stf/cuda/sparse_product.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/cuda/launch.h"
#include "core/tensors.h"
#include "stf/cuda/atoms_to_rows.cuh"
#include "stf/cuda/dense_product.h"
#include "stf/cuda/expand_factor.cuh"
#include "stf/cuda/layout.h"
#include "stf/cuda/product_of_parts.h"
#include "stf/cuda/repair_tokens.cuh"
#include "stf/cuda/rows_to_atoms.cuh"
#include "stf/cuda/take_nonzeros.cuh"
#include "stf/cuda/value_gradient.cuh"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

using kernels::accumulate_t;

}  // namespace

at::Tensor CudaSparseProduct::dense() const {
  const auto v = values.contiguous(), i = indices.contiguous();
  auto result = at::empty({v.size(0), v.size(1), basis_size}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int64_t most_bytes = 8 * 1024;  // of each warp
    const auto chunk = std::min<int64_t>(basis_size, most_bytes / sizeof(accumulate_t<T>));
    device::launch({divide_up(v.size(0) * v.size(1), kernels::stf::cuda::expand_rows),
                    kernels::stf::cuda::expand_threads, kernels::stf::cuda::expand_shared_bytes<T>(chunk)},
                   kernels::stf::cuda::expand_factor<T>,
                   kernels::stf::cuda::ExpandFactor<T>{sparse_factor<T>(v, i, basis_size),
                                                       static_cast<T*>(result.mutable_data_ptr()), chunk});
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
      device::launch({num_tokens, kernels::stf::cuda::repair_threads}, kernels::stf::cuda::repair_tokens<T>,
                     kernels::stf::cuda::RepairTokens<T, kernels::stf::SparseFactor>{
                         sparse_factor<T>(v, i, basis_size), static_cast<const T*>(a.const_data_ptr()),
                         data_or_null<T>(b), static_cast<T*>(output.mutable_data_ptr()), num_tokens});
    });
    return output;
  }
  auto output = at::empty({num_tokens, v.size(0)}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_token_tile(num_tokens, [&](auto tokens) {
      constexpr int64_t most_bytes = 64 * 1024;
      const auto chunk = std::min<int64_t>(basis_size, most_bytes / (tokens * sizeof(accumulate_t<T>)));
      device::launch({{divide_up(v.size(0), kernels::stf::cuda::gather_rows), divide_up(num_tokens, tokens)},
                      kernels::stf::cuda::gather_threads,
                      kernels::stf::cuda::gather_shared_bytes<T>(chunk, tokens)},
                     kernels::stf::cuda::atoms_to_rows<decltype(tokens)::value, T>,
                     kernels::stf::cuda::AtomsToRows<T>{sparse_factor<T>(v, i, basis_size),
                                                        static_cast<const T*>(a.const_data_ptr()), data_or_null<T>(b),
                                                        static_cast<T*>(output.mutable_data_ptr()), num_tokens, chunk});
    });
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
    for_token_tile(num_tokens, [&](auto tokens) {
      using kernels::stf::cuda::columns_of_thread;
      const auto threads = std::min<int64_t>(divide_up(divide_up(basis_size, columns_of_thread), 32) * 32,
                                             kernels::stf::cuda::scatter_most_threads);
      const auto chunks = divide_up(basis_size, threads * columns_of_thread);
      const auto tiles = divide_up(num_tokens, tokens);
      const Parts parts(v.size(0), kernels::stf::cuda::tile_rows<T>, chunks * v.size(1) * tiles);
      add_up_parts<T>(output, parts.count, std::nullopt, [&](accumulate_t<T>* sums) {
        device::launch({{chunks * v.size(1), parts.count, tiles},
                        static_cast<unsigned>(threads),
                        kernels::stf::cuda::scatter_shared_bytes<T>(threads, tokens)},
                       kernels::stf::cuda::rows_to_atoms<decltype(tokens)::value, T>,
                       kernels::stf::cuda::RowsToAtoms<T>{sparse_factor<T>(v, i, basis_size),
                                                          static_cast<const T*>(r.const_data_ptr()), sums, num_tokens,
                                                          parts.size});
      });
    });
  });
  return output;
}

at::Tensor CudaSparseProduct::value_gradient(const at::Tensor& rows, const at::Tensor& atoms) const {
  const auto num_tokens = rows.size(0);
  const auto i = indices.contiguous(), r = rows.contiguous(), a = atoms.contiguous();
  auto grad_values = at::empty(i.sizes(), rows.options());
  const auto blocks = divide_up(i.numel(), threads_of_elements);
  if (num_tokens > few_tokens) {
    const auto grad = at::bmm(r.t().unsqueeze(0).expand({i.size(1), i.size(0), num_tokens}), a);
    for_dtype(rows.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      device::launch({blocks, threads_of_elements}, kernels::stf::cuda::take_nonzeros<T>,
                     sparse_factor<T>({}, i, basis_size), static_cast<const T*>(grad.const_data_ptr()),
                     static_cast<T*>(grad_values.mutable_data_ptr()));
    });
    return grad_values;
  }
  for_dtype(rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch({blocks, threads_of_elements}, kernels::stf::cuda::value_gradient<T>,
                   kernels::stf::cuda::ValueGradient<T>{sparse_factor<T>({}, i, basis_size),
                                                        static_cast<const T*>(r.const_data_ptr()),
                                                        static_cast<const T*>(a.const_data_ptr()),
                                                        static_cast<T*>(grad_values.mutable_data_ptr()), num_tokens});
  });
  return grad_values;
}

}  // namespace torchops
