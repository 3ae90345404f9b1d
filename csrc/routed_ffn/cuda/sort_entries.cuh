#pragma once

#include "core/cuda/stable_places.cuh"
#include "routed_ffn/entries.h"

// A stable counting sort in three launches: each piece counts its entries of every block, the counts become places, and
// each piece puts its entries there. A warp has a piece.

namespace torchops::kernels::routed_ffn {

inline constexpr int pieces_of_block = 4;
inline constexpr int place_threads = 256;

__device__ inline int64_t own_piece() {
  return int64_t{blockIdx.x} * pieces_of_block + device::warp_index();
}

// Grid [pieces / pieces_of_block, rounded up], pieces_of_block warps.
static __global__ void count_entries(Entries entries) {
  const int64_t piece = own_piece();
  if (piece >= entries.num_pieces()) {
    return;
  }
  int32_t* counts = entries.counts_of(piece);
  for (int64_t block = device::lane_index(); block <= entries.num_blocks; block += device::warp_size) {
    counts[block] = 0;
  }
  device::syncwarp();
  for (int64_t entry = entries.begin_of(piece) + device::lane_index(); entry < entries.end_of(piece);
       entry += device::warp_size) {
    device::atomic_add(&counts[entries.block_of(entry)], 1);
  }
}

// One block of place_threads. Shared memory: 32 integers.
static __global__ void place_pieces(Entries entries) {
  device::SharedMemory memory;
  auto* shared = memory.take<int32_t>(device::max_warps);
  const int64_t pieces = entries.num_pieces();
  int32_t placed = 0;
  for (int64_t first = 0; first <= entries.num_blocks; first += blockDim.x) {
    const int64_t block = first + threadIdx.x;
    int32_t size = 0;
    for (int64_t piece = 0; piece < pieces && block <= entries.num_blocks; ++piece) {
      size += entries.counts_of(piece)[block];
    }
    int32_t total;
    int32_t place = placed + device::exclusive_sum(size, shared, total);
    placed += total;
    if (block <= entries.num_blocks) {
      entries.offsets[block] = place;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        int32_t& count = entries.counts_of(piece)[block];
        const int32_t next = place + count;
        count = place;
        place = next;
      }
    }
  }
}

// Grid and threads as in count_entries.
static __global__ void order_entries(Entries entries) {
  const int64_t piece = own_piece();
  if (piece >= entries.num_pieces()) {
    return;
  }
  const int64_t end = entries.end_of(piece);
  for (int64_t first = entries.begin_of(piece); first < end; first += device::warp_size) {
    const int64_t entry = first + device::lane_index();
    const int64_t block = entry < end ? entries.block_of(entry) : -1;
    const int32_t place = device::take_place(entries.counts_of(piece), block);
    if (place >= 0) {
      entries.order[place] = static_cast<int32_t>(entry);
    }
  }
}

}  // namespace torchops::kernels::routed_ffn
