#pragma once

#include "core/cuda/block.cuh"

namespace torchops::device {

// The next place of each lane's group, -1 for a lane without one: lanes of the same group take theirs in their order,
// and next[group] moves behind them. All lanes of a warp call it, and no other warp uses `next` meanwhile.
__device__ inline int32_t take_place(int32_t* next, int64_t group) {
  const int lane = lane_index();
  const bool has_group = group >= 0;
  // Lanes of the same group find each other, the group of the lowest remaining lane first.
  uint32_t same = 0;
  for (uint32_t remaining = ballot(has_group); remaining != 0;) {
    const int64_t leading = shuffle(group, ffs(remaining) - 1);
    const uint32_t with_leader = ballot(has_group && group == leading);
    same = group == leading ? with_leader : same;
    remaining &= ~with_leader;
  }
  const int rank = popc(same & ((uint32_t{1} << lane) - 1));
  const int32_t place = has_group ? next[group] + rank : -1;
  syncwarp();
  if (has_group && rank == 0) {
    next[group] += popc(same);
  }
  syncwarp();
  return place;
}

}  // namespace torchops::device
