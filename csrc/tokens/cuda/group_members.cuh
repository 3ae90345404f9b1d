#pragma once

#include "core/cuda/stable_places.cuh"
#include "tokens/cuda/assigned_group.cuh"
#include "tokens/cuda/launches.h"

namespace torchops::kernels::tokens {

// A block of group_members_warps warps per batch row, grid [B]. Each warp has its own stretch of tokens
// and counts its members of every group, so that its places follow from the counts of the warps before.
// Shared memory: 32 integers.
static __global__ void group_members(GroupMembers args) {
  device::SharedMemory memory;
  auto* shared = memory.take<int32_t>(device::max_warps);
  const int warp = device::warp_index(), lane = device::lane_index();
  const int64_t groups = args.num_groups;
  const int64_t batch = blockIdx.x;
  const int64_t* assign = args.assign + batch * args.num_tokens;
  int64_t* offsets = args.offsets + batch * (groups + 1);
  int64_t* members = args.members + batch * args.num_tokens;
  int32_t* counts = args.counts + batch * group_members_warps * groups;
  int32_t* own_counts = counts + warp * groups;

  constexpr int64_t round = group_members_warps * device::warp_size;
  const int64_t stretch = (args.num_tokens + round - 1) / round * device::warp_size;
  const int64_t begin = warp * stretch;
  const int64_t end = begin + stretch < args.num_tokens ? begin + stretch : args.num_tokens;

  for (int64_t i = threadIdx.x; i < group_members_warps * groups; i += blockDim.x) {
    counts[i] = 0;
  }
  device::syncthreads();
  for (int64_t i = begin + lane; i < end; i += device::warp_size) {
    const int64_t group = assigned_group(assign[i], groups);
    if (group >= 0) {
      device::atomic_add(&own_counts[group], 1);
    }
  }
  device::syncthreads();

  // counts becomes the place of each warp's first member of each group.
  int32_t placed = 0;
  for (int64_t first = 0; first < groups; first += blockDim.x) {
    const int64_t group = first + threadIdx.x;
    int32_t size = 0;
    for (int w = 0; w < group_members_warps && group < groups; ++w) {
      size += counts[w * groups + group];
    }
    int32_t total;
    int32_t place = placed + device::exclusive_sum(size, shared, total);
    placed += total;
    if (group < groups) {
      offsets[group] = place;
      for (int w = 0; w < group_members_warps; ++w) {
        const int32_t count = counts[w * groups + group];
        counts[w * groups + group] = place;
        place += count;
      }
    }
  }
  if (threadIdx.x == 0) {
    offsets[groups] = placed;
  }
  device::syncthreads();

  for (int64_t first = begin; first < end; first += device::warp_size) {
    const int64_t token = first + lane;
    const int64_t group = token < end ? assigned_group(assign[token], groups) : -1;
    const int32_t place = device::take_place(own_counts, group);
    if (place >= 0) {
      members[place] = token;
    }
  }
}

}  // namespace torchops::kernels::tokens
