#pragma once

#include "tokens/cuda/matched_tokens.cuh"

namespace torchops::kernels::tokens {

// The pairs [B, R] in descending similarity. `unordered` [B, R] is scratch. A block of
// matched_tokens_threads per batch row.
static __global__ void pair_matched_tokens(MatchedTokens args, int64_t* unordered, int64_t* sources,
                                           int64_t* destinations) {
  const int64_t batch = blockIdx.x;
  const int64_t row = batch * args.num_removed;
  const int32_t* similarity = args.similarity + batch * args.num_sources;
  const int64_t* destination = args.destination + batch * args.num_sources;
  for (int64_t i = threadIdx.x; i < args.num_removed; i += blockDim.x) {
    unordered[row + i] = -1;
  }
  const device::BlockMemory memory;
  const auto merge = [&](int64_t source, int64_t, int32_t place) {
    // Its rank takes all others to be known.
    unordered[row + place] = source;
  };
  const auto drop = [&](int64_t position, int32_t place) {
    sources[row + place] = position;
    destinations[row + place] = -1;
  };
  for_removed_tokens(args, memory, merge, drop);

  // Sources stand in ascending order of position, so each one's rank is the number of better ones.
  for (int64_t i = threadIdx.x; i < args.num_removed && unordered[row + i] >= 0; i += blockDim.x) {
    const int64_t source = unordered[row + i];
    const int64_t own = (source - args.first_source) / 2;
    int64_t rank = 0;
    for (int64_t j = 0; j < args.num_removed && unordered[row + j] >= 0; ++j) {
      const int32_t other = similarity[(unordered[row + j] - args.first_source) / 2];
      rank += other > similarity[own] || (other == similarity[own] && j < i) ? 1 : 0;
    }
    sources[row + rank] = source;
    destinations[row + rank] = destination[own];
  }
}

}  // namespace torchops::kernels::tokens
