#pragma once

#include "core/cuda/block.cuh"
#include "sparse_attention/cuda/launches.h"

namespace torchops::kernels::sparse_attention {

inline constexpr int choice_threads = 128;

// How many of four codes agree.
__device__ inline int agreeing_codes(uint32_t four, uint32_t others) {
  const uint32_t different = four ^ others;
  // The high bit of each byte: whether it is not zero.
  const uint32_t nonzero = (((different & 0x7f7f7f7f) + 0x7f7f7f7f) | different) & 0x80808080;
  return 4 - device::popc(nonzero);
}

// One query and all its keys.
struct KeyOrder {
  const CodeChoice& args;
  const uint32_t* query_codes;
  const uint32_t* key_codes;
  const uint8_t* seen;
  QueryPlace query;

  // Larger for a key that is chosen before another, no two equal, and 0 for one that is not seen: what the key counts
  // for, then how near it is.
  __device__ uint64_t operator()(int64_t key) const {
    if (seen != nullptr && seen[key] == 0) {
      return 0;
    }
    uint64_t count = 1;
    if (query.sink.contains(key) || query.local.contains(key)) {
      count = 255;
    } else {
      const int64_t words = args.num_subspaces / 4;
      for (int64_t word = 0; word < words; ++word) {
        count += static_cast<uint64_t>(agreeing_codes(query_codes[word], key_codes[key * words + word]));
      }
    }
    const bool behind = key > query.place;
    const auto distance = static_cast<uint32_t>(behind ? key - query.place : query.place - key);
    return count << 32 | (~uint32_t{0} - (2 * distance + (behind ? 1 : 0)));
  }
};

// A block of choice_threads for each query of a tile, which writes its keys, ascending, and `behind` where it sees
// fewer than num_chosen. key_codes are [B, Hkv, Lk, M] with four codes to a word, where M is a multiple of 4 on both
// sides.
static __global__ void __launch_bounds__(choice_threads)
    choose_by_codes(CodeChoice args, QueryTile tile, int32_t* lists, int32_t behind) {
  const device::BlockMemory memory;
  const auto [batch, head, index] = tile.place(blockIdx.x, args.num_kv_heads, args.num_heads / args.num_kv_heads);
  const KeyOrder order{args, reinterpret_cast<const uint32_t*>(args.query_codes.row(batch, head, index)),
                       reinterpret_cast<const uint32_t*>(args.codes_of(batch, head)), args.seen_of(batch),
                       place_of(args, args.sequence(batch), index)};
  const auto end = static_cast<int32_t>(order.query.end), thread = static_cast<int32_t>(threadIdx.x);
  const auto wanted = static_cast<int32_t>(args.num_chosen);
  int32_t* const indices = lists + int64_t{blockIdx.x} * wanted;

  int32_t seen = 0;
  if (args.seen == nullptr) {
    seen = end;
  } else {
    for (int32_t first = 0; first < end; first += choice_threads) {
      seen += device::syncthreads_count(first + thread < end && order.seen[first + thread] != 0);
    }
  }
  uint64_t last = 1;
  if (seen > wanted) {
    last = device::select_largest<40>(order, end, wanted, memory.histogram).threshold;
  }
  int32_t number = 0;
  for (int32_t first = 0; first < end; first += choice_threads) {
    const int32_t key = first + thread;
    const bool chosen = key < end && order(key) >= last;
    int32_t here;
    const int32_t place = number + device::exclusive_sum(chosen ? 1 : 0, memory.sums, here);
    number += here;
    if (chosen) {
      indices[place] = key;
    }
  }
  for (int32_t i = number + thread; i < wanted; i += choice_threads) {
    indices[i] = behind;
  }
}

}  // namespace torchops::kernels::sparse_attention
