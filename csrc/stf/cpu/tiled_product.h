#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/cpu/aligned_buffer.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "stf/cpu/sparse_product_kernel.h"
#include "stf/cpu/wrong_index.h"

// Products of tiles of tokens with a factor whose nonzeros are lists, for a sparse factor and for a packed one.

namespace torchops {

// tokens [..., T, size] with contiguous rows -> [..., tiles][size][token_tile]
template <typename T>
AlignedBuffer<kernels::accumulate_t<T>> token_tiles(const at::Tensor& tokens, int64_t token_tile) {
  const auto size = tokens.size(-1), num_tokens = tokens.size(-2);
  const auto count = tokens.dim() == 3 ? tokens.size(0) : 1;
  const auto tiles = kernels::stf::parts_of(num_tokens, token_tile);
  AlignedBuffer<kernels::accumulate_t<T>> result(static_cast<size_t>(count * tiles * size * token_tile));
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

// work(scratch, begin, end) returns what kernels do that read indices.
template <typename Work>
void parallel_lists(int64_t count, int64_t cost, int64_t scratch_bytes, WrongIndex& wrong, const Work& work) {
  parallel_units(count, cost, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    wrong.found(work(scratch.data(), begin, end));
  });
}

// atoms [blocks, T, K] with contiguous rows -> output [T, rows]
template <typename T, template <typename> typename Factor>
void tiled_atoms_to_rows(const Factor<T>& factor, const at::Tensor& atoms, const std::optional<at::Tensor>& bias,
                         const at::Tensor& output, WrongIndex& wrong) {
  const auto num_tokens = atoms.size(1);
  const auto b = bias ? bias->contiguous() : at::Tensor();
  const auto token_tile = TORCHOPS_KERNEL(stf, token_tile<T>)(num_tokens);
  auto tiles = token_tiles<T>(atoms, token_tile);
  const kernels::stf::AtomsToRows<T, Factor> args{
      factor, tiles.data(), data_or_null<T>(b), static_cast<T*>(output.mutable_data_ptr()), num_tokens, token_tile};
  const auto scratch = TORCHOPS_KERNEL(stf, sparse_scratch_bytes<T, Factor>)(factor, token_tile);
  // Units that share what they read of the factor are neighbours.
  parallel_lists(args.num_units(), kernels::stf::row_block * factor.row_size(), scratch, wrong,
                 [&](char* memory, int64_t begin, int64_t end) {
                   return TORCHOPS_KERNEL(stf, atoms_to_rows<T, Factor>)(args, memory, begin, end);
                 });
}

// rows [T, rows] with contiguous rows -> output [blocks, T, K], with a factor of these sizes that sort(sorted, begin,
// end) reads chunk by chunk.
template <typename T, typename Sort>
void sorted_rows_to_atoms(const kernels::stf::SparseFactor<T>& factor, const at::Tensor& rows, const at::Tensor& output,
                          WrongIndex& wrong, const Sort& sort) {
  const auto num_tokens = rows.size(0);
  const auto token_tile = TORCHOPS_KERNEL(stf, token_tile<T>)(num_tokens);
  kernels::stf::SortedFactor<T> sorted{factor, kernels::stf::sources_of_chunk(factor, token_tile), nullptr, nullptr,
                                       nullptr};
  const auto num_nonzeros = static_cast<size_t>(factor.num_rows * factor.row_size());
  AlignedBuffer<kernels::accumulate_t<T>> sorted_values(num_nonzeros);
  AlignedBuffer<uint16_t> sorted_rows(num_nonzeros);
  AlignedBuffer<int32_t> starts(static_cast<size_t>(sorted.first_start(sorted.num_chunks(), 0)));
  sorted.values = sorted_values.data();
  sorted.rows = sorted_rows.data();
  sorted.starts = starts.data();
  parallel_units(sorted.num_chunks(), sorted.chunk_rows * factor.row_size(),
                 [&](int64_t begin, int64_t end) { wrong.found(sort(sorted, begin, end)); });
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

}  // namespace torchops
