#pragma once

#include "stf/cuda/expand_row.cuh"

// The sparse factor as the dense matrix that it is, for products with many tokens.

namespace torchops::kernels::stf::cuda {

template <typename T>
struct ExpandFactor {
  SparseFactor<T> factor;
  T* dense;       // [rows, blocks, K]
  int64_t chunk;  // columns that a warp has in shared memory at a time
};

inline constexpr int expand_threads = 128;
inline constexpr int64_t expand_rows = expand_threads / device::warp_size;

template <typename T>
constexpr size_t expand_shared_bytes(int64_t chunk) {
  return device::shared_size<accumulate_t<T>>(static_cast<size_t>(expand_rows * chunk));
}

// A warp per row and block, grid [rows * blocks / expand_rows].
template <typename T>
__global__ void expand_factor(ExpandFactor<T> args) {
  using A = accumulate_t<T>;
  device::SharedMemory memory;
  A* const columns = memory.take<A>(static_cast<size_t>(expand_rows * args.chunk)) + device::warp_index() * args.chunk;
  const SparseFactor<T>& factor = args.factor;
  const int64_t unit = int64_t{blockIdx.x} * expand_rows + device::warp_index();
  if (unit >= factor.num_rows * factor.num_blocks) {
    return;
  }
  T* const dense = args.dense + unit * factor.basis_size;
  for (int64_t first = 0; first < factor.basis_size; first += args.chunk) {
    const int64_t count = device::min(args.chunk, factor.basis_size - first);
    expand_row(factor, unit / factor.num_blocks, unit % factor.num_blocks, first, count, columns);
    for (int64_t c = device::lane_index(); c < count; c += device::warp_size) {
      dense[first + c] = device::narrow<T>(columns[c]);
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
