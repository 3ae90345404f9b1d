#include <algorithm>

#include "core/cuda/dtypes.h"
#include "core/cuda/launch.h"
#include "stf/cuda/add_parts.cuh"
#include "stf/cuda/atoms_to_rows.cuh"
#include "stf/cuda/expand_factor.cuh"
#include "stf/cuda/launches.h"
#include "stf/cuda/repair_tokens.cuh"
#include "stf/cuda/rows_to_atoms.cuh"
#include "stf/cuda/select.cuh"
#include "stf/cuda/take_nonzeros.cuh"
#include "stf/cuda/value_gradient.cuh"

namespace torchops::kernels::stf::cuda {
namespace {

template <typename T>
int64_t blocks_of_nonzeros(const SparseFactor<T>& factor) {
  return divide_up(factor.num_rows * factor.row_size(), threads_of_elements);
}

// A block of rows_to_atoms has a chunk of columns.
struct ScatterChunks {
  int64_t threads, count;

  explicit ScatterChunks(int64_t basis_size)
      : threads(std::min<int64_t>(divide_up(divide_up(basis_size, columns_of_thread), 32) * 32, scatter_most_threads)),
        count(divide_up(basis_size, threads * columns_of_thread)) {}
};

}  // namespace

template <typename T>
void launch_select(const Select<T>& args, int64_t num_rows) {
  device::launch({num_rows, select_threads, device::BlockMemory::bytes}, select<T>, args);
}

template <typename T>
void launch_expand_factor(const SparseFactor<T>& factor, T* dense) {
  constexpr int64_t most_bytes = 8 * 1024;  // of each warp
  const auto chunk = std::min<int64_t>(factor.basis_size, most_bytes / sizeof(accumulate_t<T>));
  device::launch(
      {divide_up(factor.num_rows * factor.num_blocks, expand_rows), expand_threads, expand_shared_bytes<T>(chunk)},
      expand_factor<T>, ExpandFactor<T>{factor, dense, chunk});
}

template <typename T>
void launch_take_nonzeros(const SparseFactor<T>& factor, const T* dense, T* values) {
  device::launch({blocks_of_nonzeros(factor), threads_of_elements}, take_nonzeros<T>, factor, dense, values);
}

template <typename T>
void launch_atoms_to_rows(const AtomsToRows<T>& args) {
  for_token_tile(args.num_tokens, [&](auto tokens) {
    constexpr int64_t most_bytes = 64 * 1024;
    AtomsToRows<T> chosen = args;
    chosen.chunk = std::min<int64_t>(args.factor.basis_size, most_bytes / (tokens * sizeof(accumulate_t<T>)));
    device::launch({{divide_up(args.factor.num_rows, gather_rows), divide_up(args.num_tokens, tokens)},
                    gather_threads,
                    gather_shared_bytes<T>(chosen.chunk, tokens)},
                   atoms_to_rows<tokens(), T>, chosen);
  });
}

template <typename T>
void launch_value_gradient(const ValueGradient<T>& args) {
  device::launch({blocks_of_nonzeros(args.factor), threads_of_elements}, value_gradient<T>, args);
}

template <typename T>
void launch_repair_tokens(const RepairTokens<T, SparseFactor>& args) {
  device::launch({args.num_tokens, repair_threads}, repair_tokens<T>, args);
}

template <typename T>
Parts parts_of(const RowsToAtoms<T>& args) {
  const ScatterChunks chunks(args.factor.basis_size);
  int64_t tiles = 0;
  for_token_tile(args.num_tokens, [&](auto tokens) { tiles = divide_up(args.num_tokens, tokens); });
  return {args.factor.num_rows, tile_rows<T>, chunks.count * args.factor.num_blocks * tiles};
}

template <typename T>
void launch_parts(const RowsToAtoms<T>& args, int64_t num_parts) {
  const ScatterChunks chunks(args.factor.basis_size);
  for_token_tile(args.num_tokens, [&](auto tokens) {
    device::launch({{chunks.count * args.factor.num_blocks, num_parts, divide_up(args.num_tokens, tokens)},
                    static_cast<unsigned>(chunks.threads),
                    scatter_shared_bytes<T>(chunks.threads, tokens)},
                   rows_to_atoms<tokens(), T>, args);
  });
}

template <typename T>
void launch_add_parts(const AddParts<T>& args) {
  device::launch({divide_up(args.size, threads_of_elements), threads_of_elements}, add_parts<T>, args);
}

#define TORCHOPS_INSTANTIATE(T)                                             \
  template void launch_select(const Select<T>&, int64_t);                   \
  template void launch_expand_factor(const SparseFactor<T>&, T*);           \
  template void launch_take_nonzeros(const SparseFactor<T>&, const T*, T*); \
  template void launch_atoms_to_rows(const AtomsToRows<T>&);                \
  template void launch_value_gradient(const ValueGradient<T>&);             \
  template void launch_repair_tokens(const RepairTokens<T, SparseFactor>&); \
  template Parts parts_of(const RowsToAtoms<T>&);                           \
  template void launch_parts(const RowsToAtoms<T>&, int64_t);               \
  template void launch_add_parts(const AddParts<T>&);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::stf::cuda
