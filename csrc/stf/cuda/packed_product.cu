#include <algorithm>

#include "core/cuda/dtypes.h"
#include "core/cuda/launch.h"
#include "stf/cuda/expand_packed_factor.cuh"
#include "stf/cuda/launches.h"
#include "stf/cuda/pack_factor.cuh"
#include "stf/cuda/packed_atoms_to_rows.cuh"
#include "stf/cuda/packed_atoms_to_rows_mma.cuh"
#include "stf/cuda/packed_rows_to_atoms.cuh"
#include "stf/cuda/packed_rows_to_atoms_mma.cuh"
#include "stf/cuda/repair_tokens.cuh"

namespace torchops::kernels::stf::cuda {
namespace {

// A block of packed_rows_to_atoms has a chunk of columns.
struct PackedScatterChunks {
  int64_t threads, count;

  explicit PackedScatterChunks(int64_t basis_size)
      : threads(std::min<int64_t>(divide_up(divide_up(basis_size, packed_columns_of_thread), 32) * 32,
                                  packed_scatter_most_threads)),
        count(divide_up(basis_size, threads * packed_columns_of_thread)) {}
};

template <typename T>
int64_t row_tiles(const PackedFactor<T>& factor) {
  return divide_up(factor.num_rows, packed_tile_rows);
}

// Tiles of columns of all blocks.
template <typename T>
int64_t column_tiles(const PackedFactor<T>& factor, int64_t columns) {
  return factor.num_blocks * divide_up(factor.basis_size, columns);
}

}  // namespace

template <typename T>
void launch_pack_factor(const PackFactor<T>& args) {
  device::launch({divide_up(args.factor.num_rows, rows_per_group) * args.factor.num_blocks, pack_threads,
                  device::shared_size<int32_t>(device::max_warps)},
                 pack_factor<T>, args);
}

template <typename T>
void launch_expand_packed_factor(const PackedFactor<T>& factor, T* dense) {
  device::launch(
      {factor.num_groups() * factor.num_blocks, threads_of_elements, device::shared_size<int32_t>(device::max_warps)},
      expand_packed_factor<T>, factor, dense);
}

template <typename T>
void launch_packed_atoms_to_rows(const PackedAtomsToRows<T>& args) {
  for_token_tile(args.num_tokens, [&](auto tokens) {
    device::launch({{args.factor.num_groups(), divide_up(args.num_tokens, tokens)},
                    packed_gather_threads,
                    packed_gather_shared_bytes<T>(tokens)},
                   packed_atoms_to_rows<tokens(), T>, args);
  });
}

template <typename T>
void launch_repair_tokens(const RepairTokens<T, PackedFactor>& args) {
  device::launch({args.num_tokens, repair_threads}, repair_packed_tokens<T>, args);
}

template <typename T>
Parts parts_of(const PackedRowsToAtoms<T>& args) {
  const PackedScatterChunks chunks(args.factor.basis_size);
  int64_t tiles = 0;
  for_token_tile(args.num_tokens, [&](auto tokens) { tiles = divide_up(args.num_tokens, tokens); });
  return {args.factor.num_groups(), 1, chunks.count * args.factor.num_blocks * tiles};
}

template <typename T>
void launch_parts(const PackedRowsToAtoms<T>& args, int64_t num_parts) {
  const PackedScatterChunks chunks(args.factor.basis_size);
  for_token_tile(args.num_tokens, [&](auto tokens) {
    device::launch({{chunks.count * args.factor.num_blocks, num_parts, divide_up(args.num_tokens, tokens)},
                    static_cast<unsigned>(chunks.threads),
                    packed_scatter_shared_bytes<T>(tokens)},
                   packed_rows_to_atoms<tokens(), T>, args);
  });
}

template <typename T>
Parts parts_of(const PackedAtomsToRowsMma<T>& args) {
  return {column_tiles(args.factor, packed_gather_tile_columns), 1,
          row_tiles(args.factor) * divide_up(args.num_tokens, packed_tile_tokens)};
}

template <typename T>
void launch_parts(const PackedAtomsToRowsMma<T>& args, int64_t num_parts) {
  device::launch({{row_tiles(args.factor), divide_up(args.num_tokens, packed_tile_tokens), num_parts},
                  packed_tile_threads,
                  packed_gather_mma_shared_bytes<T>},
                 packed_atoms_to_rows_mma<T>, args);
}

template <typename T>
Parts parts_of(const PackedRowsToAtomsMma<T>& args) {
  return {row_tiles(args.factor), 1,
          column_tiles(args.factor, packed_scatter_tile_columns) * divide_up(args.num_tokens, packed_tile_tokens)};
}

template <typename T>
void launch_parts(const PackedRowsToAtomsMma<T>& args, int64_t num_parts) {
  device::launch({{column_tiles(args.factor, packed_scatter_tile_columns),
                   divide_up(args.num_tokens, packed_tile_tokens), num_parts},
                  packed_tile_threads,
                  packed_scatter_mma_shared_bytes<T>},
                 packed_rows_to_atoms_mma<T>, args);
}

#define TORCHOPS_INSTANTIATE(T)                                             \
  template void launch_pack_factor(const PackFactor<T>&);                   \
  template void launch_expand_packed_factor(const PackedFactor<T>&, T*);    \
  template void launch_packed_atoms_to_rows(const PackedAtomsToRows<T>&);   \
  template void launch_repair_tokens(const RepairTokens<T, PackedFactor>&); \
  template Parts parts_of(const PackedRowsToAtoms<T>&);                     \
  template void launch_parts(const PackedRowsToAtoms<T>&, int64_t);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

#define TORCHOPS_INSTANTIATE_MMA(T)                                    \
  template Parts parts_of(const PackedAtomsToRowsMma<T>&);             \
  template Parts parts_of(const PackedRowsToAtomsMma<T>&);             \
  template void launch_parts(const PackedAtomsToRowsMma<T>&, int64_t); \
  template void launch_parts(const PackedRowsToAtomsMma<T>&, int64_t);
TORCHOPS_INSTANTIATE_MMA(bfloat16)
TORCHOPS_INSTANTIATE_MMA(float16)

}  // namespace torchops::kernels::stf::cuda
