#pragma once

#include "core/cuda/block.cuh"
#include "routed_ffn/grouped_product.h"

namespace torchops::kernels::routed_ffn {

// An offset. Nobody looked at it before it came here: one out of range stops a debug build, and counts as the nearest
// in range in a release build.
__device__ __forceinline__ int checked_offset(const Groups& groups, int group) {
  const int offset = groups.offsets[group], rows = static_cast<int>(groups.num_rows);
  device::debug_assert(0 <= offset && offset <= rows, "an offset is in 0..M");
  return device::min(device::max(offset, 0), rows);
}

// Rows first..end-1 of all.
struct RowRange {
  int64_t first, end;
};

// Those behind the last offset are the group `count`. Where offsets descend, there are none.
__device__ __forceinline__ RowRange rows_of_group(const Groups& groups, int group) {
  const int begin = checked_offset(groups, group);
  const int end =
      group == static_cast<int>(groups.count) ? static_cast<int>(groups.num_rows) : checked_offset(groups, group + 1);
  device::debug_assert(begin <= end, "offsets ascend");
  return {begin, end};
}

// A group is cut into tiles of rows, which take numbered slots: those of group g begin at offsets[g] / tile + g, for
// from there to the next group's it has no more than one tile for each slot. Some slots have no tile, but a block finds
// its own without a list of them.
constexpr int64_t num_slots(const Groups& groups, int tile) {
  return groups.num_rows / tile + groups.count + 1;
}

struct TileOfGroup {
  int group;
  RowRange rows;  // from the tile's first row to the group's end; none where the slot has no tile
};

// Every lane of a warp calls it.
__device__ inline TileOfGroup tile_of_slot(const Groups& groups, int64_t slot, int tile) {
  const auto slot_of = [&](int group) { return int64_t{checked_offset(groups, group) / tile} + group; };
  // The last group whose slots begin here or before, among [first, end).
  int first = 0, end = static_cast<int>(groups.count) + 1;
  while (end - first > 1) {
    const int step = (end - first + device::warp_size - 1) / device::warp_size;
    const int probe = first + device::lane_index() * step;
    const bool begins = device::lane_index() == 0 || (probe < end && slot_of(probe) <= slot);
    first += (device::popc(device::ballot(begins)) - 1) * step;
    end = device::min(end, first + step);
  }
  const RowRange rows = rows_of_group(groups, first);
  return {first, {rows.first + (slot - slot_of(first)) * tile, rows.end}};
}

}  // namespace torchops::kernels::routed_ffn
