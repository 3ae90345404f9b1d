#include "stf/cpu/sparse_product.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "core/cpu/aligned_buffer.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "stf/cpu/dense_code.h"
#include "stf/cpu/sparse_product_kernel.h"
#include "stf/cpu/wrong_index.h"
#include "stf/linear.h"

namespace torchops {
namespace {

using kernels::accumulate_t;
using kernels::stf::parts_of;
using kernels::stf::SparseFactor;

template <typename T>
SparseFactor<T> sparse_factor(const at::Tensor& values, const at::Tensor& indices, int64_t basis_size) {
  return {values.defined() ? static_cast<const T*>(values.const_data_ptr()) : nullptr,
          indices.const_data_ptr(),
          indices.scalar_type() == at::kByte,
          indices.size(0),
          indices.size(1),
          indices.size(2),
          basis_size};
}

// tokens [..., T, size] with contiguous rows -> [..., tiles][size][token_tile]
template <typename T>
AlignedBuffer<accumulate_t<T>> token_tiles(const at::Tensor& tokens, int64_t token_tile) {
  const auto size = tokens.size(-1), num_tokens = tokens.size(-2);
  const auto count = tokens.dim() == 3 ? tokens.size(0) : 1;
  const auto tiles = parts_of(num_tokens, token_tile);
  AlignedBuffer<accumulate_t<T>> result(static_cast<size_t>(count * tiles * size * token_tile));
  for (int64_t i = 0; i < count; ++i) {
    const auto rows = tokens.dim() == 3 ? tokens[i] : tokens;
    const kernels::stf::TokenTiles<T> args{
        static_cast<const T*>(rows.const_data_ptr()), rows.stride(0), num_tokens, size, token_tile,
        result.data() + i * tiles * size * token_tile};
    parallel_units(tiles, token_tile * size,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(stf, token_tiles<T>)(args, begin, end); });
  }
  return result;
}

// Units of work that share what they read of the factor are neighbours.
template <typename Work>
void parallel_blocks(int64_t count, int64_t cost, int64_t scratch_bytes, WrongIndex& wrong, const Work& work) {
  parallel_units(count, cost, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    wrong.found(work(scratch.data(), begin, end));
  });
}

template <typename T>
void gather(const SparseFactor<T>& factor, const at::Tensor& rows, at::Tensor& output, WrongIndex& wrong) {
  const auto num_tokens = rows.size(0);
  const auto token_tile = TORCHOPS_KERNEL(stf, token_tile<T>)(num_tokens);
  kernels::stf::SortedFactor<T> sorted{factor, kernels::stf::sources_of_chunk(factor, token_tile), nullptr, nullptr,
                                       nullptr};
  const auto num_nonzeros = static_cast<size_t>(factor.num_rows * factor.row_size());
  AlignedBuffer<accumulate_t<T>> sorted_values(num_nonzeros);
  AlignedBuffer<uint16_t> sorted_rows(num_nonzeros);
  AlignedBuffer<int32_t> starts(static_cast<size_t>(sorted.first_start(sorted.num_chunks(), 0)));
  sorted.values = sorted_values.data();
  sorted.rows = sorted_rows.data();
  sorted.starts = starts.data();
  parallel_units(sorted.num_chunks(), sorted.chunk_rows * factor.row_size(), [&](int64_t begin, int64_t end) {
    wrong.found(TORCHOPS_KERNEL(stf, sort_rows<T>)(sorted, begin, end));
  });
  if (wrong.any()) {
    return;
  }
  auto tiles = token_tiles<T>(rows, token_tile);
  const kernels::stf::SortedRowsToAtoms<T> args{sorted, tiles.data(), static_cast<T*>(output.mutable_data_ptr()),
                                                num_tokens, token_tile};
  const auto scratch_bytes = TORCHOPS_KERNEL(stf, sorted_scratch_bytes<T>)(token_tile);
  parallel_units(args.num_units(), token_tile * factor.num_rows, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    TORCHOPS_KERNEL(stf, sorted_rows_to_atoms<T>)(args, scratch.data(), begin, end);
  });
}

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
  const auto scratch = TORCHOPS_KERNEL(stf, sparse_scratch_bytes<T>)(factor, token_tile);
  parallel_blocks(args.num_units(), args.part_size() * factor.row_size(), scratch, wrong,
                  [&](char* memory, int64_t begin, int64_t end) {
                    return TORCHOPS_KERNEL(stf, rows_to_atoms<T>)(args, memory, begin, end);
                  });
  parallel_units(args.num_output_units(), factor.basis_size * token_tile,
                 [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(stf, add_parts<T>)(args, begin, end); });
}

}  // namespace

at::Tensor CpuSparseProduct::atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const {
  const auto num_tokens = atoms.size(1);
  const auto v = values.contiguous(), i = indices.contiguous(), a = with_contiguous_rows(atoms);
  const auto b = bias ? bias->contiguous() : at::Tensor();
  auto output = at::empty({num_tokens, v.size(0)}, v.options());
  if (dense_code_pays(v.scalar_type(), num_tokens)) {
    // Blocks are parts of one depth.
    const auto code = dense_code(op, v, i, basis_size).flatten(1);
    dense_product(join_blocks(a).unsqueeze(0), code.t().unsqueeze(0), output.unsqueeze(0),
                  b.defined() ? std::optional(b.unsqueeze(0)) : std::nullopt);
    return output;
  }
  WrongIndex wrong;
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto token_tile = TORCHOPS_KERNEL(stf, token_tile<T>)(num_tokens);
    auto tiles = token_tiles<T>(a, token_tile);
    const kernels::stf::AtomsToRows<T> args{sparse_factor<T>(v, i, basis_size),
                                            tiles.data(),
                                            b.defined() ? static_cast<const T*>(b.const_data_ptr()) : nullptr,
                                            static_cast<T*>(output.mutable_data_ptr()),
                                            num_tokens,
                                            token_tile};
    const auto scratch = TORCHOPS_KERNEL(stf, sparse_scratch_bytes<T>)(args.factor, token_tile);
    parallel_blocks(args.num_units(), kernels::stf::row_block * args.factor.row_size(), scratch, wrong,
                    [&](char* memory, int64_t begin, int64_t end) {
                      return TORCHOPS_KERNEL(stf, atoms_to_rows<T>)(args, memory, begin, end);
                    });
  });
  wrong.check(op, i, basis_size);
  return output;
}

at::Tensor CpuSparseProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto v = values.contiguous(), i = indices.contiguous(), r = with_contiguous_rows(rows);
  auto output = at::empty({v.size(1), rows.size(0), basis_size}, v.options());
  if (output.numel() == 0) {
    return output;
  }
  if (dense_code_pays(v.scalar_type(), rows.size(0))) {
    const auto code = dense_code(op, v, i, basis_size).transpose(0, 1);
    dense_product(r.unsqueeze(0).expand({code.size(0), -1, -1}), code, output, std::nullopt);
    return output;
  }
  WrongIndex wrong;
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto factor = sparse_factor<T>(v, i, basis_size);
    if (TORCHOPS_KERNEL(stf, sorting_pays<T>)(rows.size(0))) {
      gather<T>(factor, r, output, wrong);
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
    const auto scratch = TORCHOPS_KERNEL(stf, sparse_scratch_bytes<T>)(args.factor, token_tile);
    parallel_blocks(args.num_units(), kernels::stf::row_block * args.factor.row_size() * num_tokens, scratch, wrong,
                    [&](char* memory, int64_t begin, int64_t end) {
                      return TORCHOPS_KERNEL(stf, value_gradient<T>)(args, memory, begin, end);
                    });
  });
  wrong.check(op, i, basis_size);
  return grad_values;
}

}  // namespace torchops
