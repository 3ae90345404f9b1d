#include "stf/cpu/packed_product.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include "stf/cpu/dense_code.h"
#include "stf/cpu/nonfinite_tokens.h"
#include "stf/cpu/packed_product_kernel.h"
#include "stf/cpu/packed_tile_product.h"
#include "stf/cpu/tiled_product.h"
#include "stf/tensor_factors.h"

namespace torchops {
namespace {

using kernels::stf::PackedFactor;
using kernels::stf::rows_per_group;
using kernels::stf::SparseFactor;

// From here on products with tiles of tokens are faster, which read each nonzero by itself.
constexpr int64_t fewest_tokens_to_gather_atoms = 64, fewest_tokens_to_gather_rows = 32;

void check_masks(const WrongIndex& wrong, int64_t nnz) {
  TORCH_CHECK_VALUE(!wrong.any(), "stf_linear_packed: expected mask to have nnz = ", nnz,
                    " bits for every row, got another number: both come from one stf_pack");
}

// work(scratch, begin, end) for `count` units of `groups` groups of rows each returns whether the masks it met go with
// the values.
template <typename T, typename Work>
void parallel_groups(const PackedFactor<T>& factor, int64_t count, int64_t groups, const Work& work) {
  WrongIndex wrong;
  parallel_lists(count, groups * rows_per_group * factor.row_size(),
                 TORCHOPS_KERNEL(stf, packed_scratch_bytes<T>)(factor), wrong,
                 [&](char* scratch, int64_t begin, int64_t end) { return work(scratch, begin, end) ? -1 : begin; });
  check_masks(wrong, factor.nnz);
}

// [rows, blocks, K], of contiguous tensors.
at::Tensor dense_code(const at::Tensor& packed_values, const at::Tensor& mask, int64_t num_rows) {
  auto code = at::empty({num_rows, mask.size(1), mask.size(2)}, packed_values.options());
  for_dtype(packed_values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::stf::PackedCode<T> args{packed_factor<T>(packed_values, mask, num_rows),
                                           static_cast<T*>(code.mutable_data_ptr())};
    parallel_groups(args.factor, args.factor.num_groups(), 1, [&](char* memory, int64_t begin, int64_t end) {
      return TORCHOPS_KERNEL(stf, packed_code<T>)(args, memory, begin, end);
    });
  });
  return code;
}

// Multiplied as a matrix with zeros: spread on the way, where tiles multiply, or written out before.
at::Tensor matrix_atoms_to_rows(const at::Tensor& packed_values, const at::Tensor& mask, int64_t num_rows,
                                const at::Tensor& atoms, const std::optional<at::Tensor>& bias) {
  if (!tiles_multiply_packed(atoms.scalar_type(), atoms.size(1))) {
    return dense_atoms_to_rows(dense_code(packed_values, mask, num_rows), atoms, bias);
  }
  WrongIndex wrong;
  auto output = tile_atoms_to_rows(packed_values, mask, num_rows, atoms, bias, wrong);
  check_masks(wrong, packed_values.size(2) / rows_per_group);
  return output;
}

at::Tensor matrix_rows_to_atoms(const at::Tensor& packed_values, const at::Tensor& mask, const at::Tensor& rows) {
  if (!tiles_multiply_packed(rows.scalar_type(), rows.size(0))) {
    return dense_rows_to_atoms(dense_code(packed_values, mask, rows.size(1)), rows);
  }
  WrongIndex wrong;
  auto output = tile_rows_to_atoms(packed_values, mask, rows, wrong);
  check_masks(wrong, packed_values.size(2) / rows_per_group);
  return output;
}

}  // namespace

at::Tensor CpuPackedProduct::atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const {
  const auto num_tokens = atoms.size(1);
  const auto v = packed_values.contiguous(), m = mask.contiguous();
  const auto by_nonzeros = [&](const at::Tensor& of_tokens) {
    auto output = at::empty({of_tokens.size(1), num_rows}, v.options());
    for_dtype(v.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto factor = packed_factor<T>(v, m, num_rows);
      WrongIndex wrong;
      tiled_atoms_to_rows<T>(factor, of_tokens, bias, output, wrong);
      check_masks(wrong, factor.nnz);
    });
    return output;
  };
  const bool as_matrix = dense_code_pays(v.scalar_type(), num_tokens);
  if (num_tokens >= fewest_tokens_to_gather_atoms && !as_matrix) {
    return by_nonzeros(with_contiguous_rows(atoms));
  }
  const auto a = atoms.contiguous();
  auto output =
      as_matrix ? matrix_atoms_to_rows(v, m, num_rows, a, bias) : at::empty({num_tokens, num_rows}, v.options());
  if (!as_matrix) {
    for_dtype(v.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto factor = packed_factor<T>(v, m, num_rows);
      const auto wide = a.to(at::toOpMathType(v.scalar_type()));
      const auto b = bias ? bias->contiguous() : at::Tensor();
      const kernels::stf::PackedAtomsToRows<T> args{factor, wide.template const_data_ptr<kernels::accumulate_t<T>>(),
                                                    data_or_null<T>(b), static_cast<T*>(output.mutable_data_ptr()),
                                                    num_tokens};
      parallel_groups(factor, factor.num_groups(), 1, [&](char* memory, int64_t begin, int64_t end) {
        return TORCHOPS_KERNEL(stf, packed_atoms_to_rows<T>)(args, memory, begin, end);
      });
    });
  }
  repair_nonfinite_tokens(output, a, by_nonzeros);
  return output;
}

at::Tensor CpuPackedProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto num_tokens = rows.size(0);
  const auto v = packed_values.contiguous(), m = mask.contiguous();
  const auto num_blocks = m.size(1), basis_size = m.size(2), missing = m.size(0) * rows_per_group - num_rows;
  if (dense_code_pays(v.scalar_type(), num_tokens)) {
    return matrix_rows_to_atoms(v, m, rows);
  }
  if (num_tokens >= fewest_tokens_to_gather_rows) {
    const auto padded = missing == 0 ? with_contiguous_rows(rows) : at::constant_pad_nd(rows, {0, missing});
    auto output = at::empty({num_blocks, num_tokens, basis_size}, v.options());
    for_dtype(v.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto factor = packed_factor<T>(v, m, num_rows);
      WrongIndex wrong;
      sorted_rows_to_atoms<T>(
          SparseFactor<T>{nullptr, nullptr, false, padded.size(1), num_blocks, factor.nnz, basis_size}, padded, output,
          wrong, [&](const auto& sorted, int64_t begin, int64_t end) {
            return TORCHOPS_KERNEL(stf, sort_packed_rows<T>)(sorted, factor, begin, end);
          });
      check_masks(wrong, factor.nnz);
    });
    return output;
  }
  const auto wide = rows.to(at::toOpMathType(v.scalar_type()));
  const auto padded = at::constant_pad_nd(wide, {0, missing}).contiguous();
  at::Tensor sums;
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    kernels::stf::PackedRowsToAtoms<T> args{packed_factor<T>(v, m, num_rows), padded.const_data_ptr<A>(), nullptr,
                                            num_tokens};
    sums = at::empty({args.num_parts(), num_blocks, num_tokens, basis_size}, wide.options());
    args.sums = sums.mutable_data_ptr<A>();
    parallel_groups(args.factor, args.num_parts(), args.groups_of_part, [&](char* memory, int64_t begin, int64_t end) {
      return TORCHOPS_KERNEL(stf, packed_rows_to_atoms<T>)(args, memory, begin, end);
    });
  });
  return sums.sum(0).to(v.scalar_type());
}

}  // namespace torchops
