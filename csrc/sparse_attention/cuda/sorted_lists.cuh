#pragma once

#include "core/cuda/block.cuh"
#include "sparse_attention/cuda/launches.h"

namespace torchops::kernels::sparse_attention {

inline constexpr int sort_threads = 128;

// What an entry is ordered by, before its place: entries that name the same keys by the bits of their biases, so that
// the order of the caller's list, biases along with it, does not show.
struct EntryOrder {
  int32_t begin;
  uint64_t bias;

  __device__ bool operator<(const EntryOrder& other) const {
    return begin < other.begin || (begin == other.begin && bias < other.bias);
  }
};

template <typename A>
__device__ __forceinline__ uint64_t order_of_bias(A bias) {
  union {
    A number;
    std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t> bits;
  } both{bias};
  return both.bits;
}

// A block for each list, grid [B * heads * Nq]. A list that is in order is copied; the entries of another are ranked,
// each by comparison with all.
template <typename T>
__global__ void __launch_bounds__(sort_threads) sort_lists(Attention<T> inputs, SortedLists sorted) {
  using A = accumulate_t<T>;
  const Lists& lists = inputs.lists;
  device::SharedMemory memory;
  EntryOrder* others = memory.take<EntryOrder>(sort_threads);
  const int64_t list = blockIdx.x % lists.num_lists, head = blockIdx.x / lists.num_lists % sorted.num_heads;
  const int64_t batch = blockIdx.x / lists.num_lists / sorted.num_heads;
  const int64_t list_head = head / (sorted.num_heads / lists.num_heads);
  const int count = static_cast<int>(lists.num_listed);
  const int64_t first = int64_t{blockIdx.x} * count;
  const Sequence sequence = inputs.sequence(batch);
  const A* biases = inputs.pair_bias == nullptr ? nullptr : inputs.pair_bias + first;
  const auto order_of = [&](int i) {
    const int64_t entry = lists.wide.data == nullptr ? int64_t{lists.narrow.row(batch, list_head, list)[i]}
                                                     : lists.wide.row(batch, list_head, list)[i];
    const Range keys = listed_keys(inputs.rule, sequence, entry);
    return EntryOrder{keys.empty() ? no_key : static_cast<int32_t>(keys.begin),
                      biases == nullptr ? 0 : order_of_bias(biases[i])};
  };

  bool in_order = true;
  for (int i = static_cast<int>(threadIdx.x); i + 1 < count; i += sort_threads) {
    in_order = in_order && !(order_of(i + 1) < order_of(i));
  }
  in_order = device::syncthreads_and(in_order);
  for (int start = 0; start < count; start += sort_threads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const EntryOrder own = i < count ? order_of(i) : EntryOrder{};
    int rank = in_order ? i : 0;
    for (int other = 0; !in_order && other < count; other += sort_threads) {
      device::syncthreads();
      if (other + static_cast<int>(threadIdx.x) < count) {
        others[threadIdx.x] = order_of(other + static_cast<int>(threadIdx.x));
      }
      device::syncthreads();
      for (int j = 0; j < sort_threads && other + j < count; ++j) {
        rank += others[j] < own || (other + j < i && !(own < others[j])) ? 1 : 0;
      }
    }
    if (i < count) {
      sorted.begins[first + rank] = own.begin;
      sorted.places[first + rank] = i;
    }
  }
}

}  // namespace torchops::kernels::sparse_attention
