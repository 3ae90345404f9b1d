#include "routed_ffn/cuda/launches.h"

#include "core/cuda/launch.h"
#include "routed_ffn/cuda/sort_entries.cuh"

namespace torchops::kernels::routed_ffn {

void launch_route(const Entries& entries) {
  const int64_t blocks = (entries.num_pieces() + pieces_of_block - 1) / pieces_of_block;
  constexpr int threads = pieces_of_block * device::warp_size;
  device::launch({.grid = blocks, .block = threads}, count_entries, entries);
  device::launch({1, place_threads, device::shared_size<int32_t>(device::max_warps)}, place_pieces, entries);
  device::launch({.grid = blocks, .block = threads}, order_entries, entries);
}

}  // namespace torchops::kernels::routed_ffn
