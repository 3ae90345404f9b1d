#pragma once

#include "core/cuda/block.cuh"
#include "tokens/matched_tokens.h"

namespace torchops::kernels::tokens {

inline constexpr int matched_tokens_threads = 256;

// Calls merge(source, destination, place) for the sources of a batch row that merge, with places in
// 0..merges-1 in ascending order of the sources, and then drop(position, place) for the padding that is
// dropped, with places from merges on, last positions first. By a block, which has its own batch row;
// what it wrote before is seen by merge and drop, and what they write is seen behind the call.
template <typename Merge, typename Drop>
__device__ void for_removed_tokens(const MatchedTokens& args, const device::BlockMemory& memory, const Merge& merge,
                                   const Drop& drop) {
  const int64_t batch = blockIdx.x;
  const int32_t* similarity = args.similarity + batch * args.num_sources;
  const int64_t* destination = args.destination + batch * args.num_sources;
  const bool* padding = args.padding == nullptr ? nullptr : args.padding + batch * args.num_tokens;
  // Where nothing is removed nobody has looked for similarities.
  const auto num_sources = args.num_removed == 0 ? 0 : static_cast<int32_t>(args.num_sources);
  const auto num_tokens = static_cast<int32_t>(args.num_tokens);
  const auto threads = static_cast<int32_t>(blockDim.x);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  // Greater for the better; 0 for a source that cannot merge.
  const auto key = [&](int32_t s) {
    return destination[s] < 0 ? uint64_t{0} : static_cast<uint64_t>(int64_t{similarity[s]} + (int64_t{1} << 31));
  };

  int32_t candidates = 0;
  for (int32_t first = 0; first < num_sources; first += threads) {
    const int32_t s = first + thread;
    int32_t count;
    device::exclusive_sum(s < num_sources && destination[s] >= 0 ? 1 : 0, memory.sums, count);
    candidates += count;
  }
  const int32_t merges = candidates < args.num_removed ? candidates : static_cast<int32_t>(args.num_removed);

  if (merges > 0) {
    const auto selection = device::select_largest(key, num_sources, merges, memory.histogram);
    int32_t ties_before = 0, places = 0;
    for (int32_t first = 0; first < num_sources; first += threads) {
      const int32_t s = first + thread;
      const uint64_t own = s < num_sources ? key(s) : 0;
      const bool tie = own == selection.threshold;
      int32_t ties, selected;
      const int32_t tie_rank = ties_before + device::exclusive_sum(tie ? 1 : 0, memory.sums, ties);
      const bool merged = own > selection.threshold || (tie && tie_rank < selection.ties);
      const int32_t place = places + device::exclusive_sum(merged ? 1 : 0, memory.sums, selected);
      ties_before += ties;
      places += selected;
      if (merged) {
        merge(args.first_source + 2 * int64_t{s}, destination[s], place);
      }
    }
  }

  int32_t padding_behind = 0;
  for (int32_t first = 0; first < num_tokens && padding != nullptr; first += threads) {
    const int32_t position = num_tokens - 1 - first - thread;
    const bool is_padding = position >= 0 && padding[position];
    int32_t count;
    const int32_t place = merges + padding_behind + device::exclusive_sum(is_padding ? 1 : 0, memory.sums, count);
    padding_behind += count;
    if (is_padding && place < args.num_removed) {
      drop(int64_t{position}, place);
    }
  }
  device::syncthreads();
}

}  // namespace torchops::kernels::tokens
