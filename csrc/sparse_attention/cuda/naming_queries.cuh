#pragma once

#include "sparse_attention/cuda/warp_rows.cuh"

namespace torchops::kernels::sparse_attention {

// The first of `count` ascending numbers that is not below `number`.
__device__ inline int lower_bound(const int32_t* ascending, int count, int64_t number) {
  int begin = 0, end = count;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (ascending[middle] < number) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Calls add(count) for those of a head's queries of the tile that see a key which their lists name, 32 at a time and at
// last the rest, in ascending order: the first `count` of memory.pending, with the places of the entries in their
// sorted lists in memory.pending_entry.
template <typename T, typename Add>
__device__ void for_naming_queries(const Attention<T>& inputs, const SortedLists& sorted,
                                   const WarpMemory<accumulate_t<T>>& memory, int64_t batch, int64_t head, int64_t key,
                                   const Add& add) {
  const Sequence sequence = inputs.sequence(batch);
  const int64_t begin = begin_of_block(inputs.rule, sequence, key);
  const int num_listed = static_cast<int>(inputs.lists.num_listed), lane = device::lane_index();
  int pending = 0;
  const int64_t end = sorted.tile.end_of_queries();
  for (int64_t first_query = sorted.tile.first_query; first_query < end; first_query += device::warp_size) {
    const int64_t query = first_query + lane;
    const int32_t* begins = nullptr;
    int entry = num_listed;
    if (query < end && key < end_of_keys(inputs.rule, sequence, query)) {
      begins = sorted.begins + sorted.first_of(inputs, batch, head, query / inputs.rule.query_block);
      entry = lower_bound(begins, num_listed, begin);
    }
    // A list names a key as often as it likes.
    for (bool more = true; more;) {
      const bool names = entry < num_listed && begins[entry] == begin;
      const uint32_t naming = device::ballot(names);
      if (names) {
        const int at = pending + device::popc(naming & ((uint32_t{1} << lane) - 1));
        memory.pending[at] = static_cast<int>(query);
        memory.pending_entry[at] = entry++;
      }
      pending += device::popc(naming);
      more = naming != 0;
      device::syncwarp();
      if (pending >= device::warp_size) {
        add(device::warp_size);
        pending -= device::warp_size;
        const int next = memory.pending[device::warp_size + lane];
        const int next_entry = memory.pending_entry[device::warp_size + lane];
        device::syncwarp();
        if (lane < pending) {
          memory.pending[lane] = next;
          memory.pending_entry[lane] = next_entry;
        }
        device::syncwarp();
      }
    }
  }
  if (pending > 0) {
    add(pending);
  }
}

}  // namespace torchops::kernels::sparse_attention
