#include "stf/cpu/sparse_product.h"

#include <ATen/ops/empty.h>

#include "stf/cpu/dense_code.h"
#include "stf/cpu/nonfinite_tokens.h"
#include "stf/cpu/tiled_product.h"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

using kernels::accumulate_t;
using kernels::stf::SparseFactor;

template <typename T>
void scatter(const SparseFactor<T>& factor, const at::Tensor& rows, at::Tensor& output, WrongIndex& wrong) {
  const auto num_tokens = rows.size(0);
  const auto token_tile = TORCHOPS_KERNEL(stf, token_tile<T>)(num_tokens);
  auto tiles = token_tiles<T>(rows, token_tile);
  kernels::stf::RowsToAtoms<T> args{factor,     tiles.data(), nullptr, static_cast<T*>(output.mutable_data_ptr()),
                                    num_tokens, token_tile};
  const auto atoms_size = factor.num_blocks * factor.basis_size * token_tile;
  AlignedBuffer<accumulate_t<T>> sums(static_cast<size_t>(args.num_units() * atoms_size));
  args.sums = sums.data();
  const auto scratch = TORCHOPS_KERNEL(stf, sparse_scratch_bytes<T, SparseFactor>)(factor, token_tile);
  parallel_lists(args.num_units(), args.part_size() * factor.row_size(), scratch, wrong,
                 [&](char* memory, int64_t begin, int64_t end) {
                   return TORCHOPS_KERNEL(stf, rows_to_atoms<T>)(args, memory, begin, end);
                 });
  parallel_units(args.num_output_units(), factor.basis_size * token_tile,
                 [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(stf, add_parts<T>)(args, begin, end); });
}

}  // namespace

at::Tensor CpuSparseProduct::atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const {
  const auto v = values.contiguous(), i = indices.contiguous();
  const auto by_nonzeros = [&](const at::Tensor& of_tokens) {
    auto output = at::empty({of_tokens.size(1), v.size(0)}, v.options());
    WrongIndex wrong;
    for_dtype(v.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      tiled_atoms_to_rows<T>(sparse_factor<T>(v, i, basis_size), of_tokens, bias, output, wrong);
    });
    wrong.check(op, i, basis_size);
    return output;
  };
  if (!dense_code_pays(v.scalar_type(), atoms.size(1))) {
    return by_nonzeros(with_contiguous_rows(atoms));
  }
  const auto a = atoms.contiguous();
  const auto output = dense_atoms_to_rows(dense_code(op, v, i, basis_size), a, bias);
  repair_nonfinite_tokens(output, a, by_nonzeros);
  return output;
}

at::Tensor CpuSparseProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto v = values.contiguous(), i = indices.contiguous(), r = with_contiguous_rows(rows);
  if (dense_code_pays(v.scalar_type(), rows.size(0))) {
    return dense_rows_to_atoms(dense_code(op, v, i, basis_size), r);
  }
  auto output = at::empty({v.size(1), rows.size(0), basis_size}, v.options());
  if (output.numel() == 0) {
    return output;
  }
  WrongIndex wrong;
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto factor = sparse_factor<T>(v, i, basis_size);
    if (TORCHOPS_KERNEL(stf, sorting_pays<T>)(rows.size(0))) {
      sorted_rows_to_atoms<T>(factor, r, output, wrong, TORCHOPS_KERNEL(stf, sort_rows<T>));
    } else {
      scatter<T>(factor, r, output, wrong);
    }
  });
  wrong.check(op, i, basis_size);
  return output;
}

at::Tensor CpuSparseProduct::value_gradient(const at::Tensor& rows, const at::Tensor& atoms) const {
  const auto num_tokens = rows.size(0);
  const auto i = indices.contiguous(), r = with_contiguous_rows(rows), a = with_contiguous_rows(atoms);
  if (dense_code_pays(rows.scalar_type(), num_tokens)) {
    auto code = at::empty({i.size(0), i.size(1), basis_size}, rows.options());
    dense_product(r.t().unsqueeze(0).expand({i.size(1), -1, -1}), a, code.transpose(0, 1), std::nullopt);
    return take_nonzeros(op, code, i);
  }
  auto grad_values = at::empty(i.sizes(), rows.options());
  WrongIndex wrong;
  for_dtype(rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto token_tile = TORCHOPS_KERNEL(stf, token_tile<T>)(num_tokens);
    auto row_tiles = token_tiles<T>(r, token_tile), atom_tiles = token_tiles<T>(a, token_tile);
    const kernels::stf::ValueGradient<T> args{
        sparse_factor<T>(at::Tensor(), i, basis_size),   row_tiles.data(), atom_tiles.data(),
        static_cast<T*>(grad_values.mutable_data_ptr()), num_tokens,       token_tile};
    const auto scratch = TORCHOPS_KERNEL(stf, sparse_scratch_bytes<T, SparseFactor>)(args.factor, token_tile);
    parallel_lists(args.num_units(), kernels::stf::row_block * args.factor.row_size() * num_tokens, scratch, wrong,
                   [&](char* memory, int64_t begin, int64_t end) {
                     return TORCHOPS_KERNEL(stf, value_gradient<T>)(args, memory, begin, end);
                   });
  });
  wrong.check(op, i, basis_size);
  return grad_values;
}

}  // namespace torchops
