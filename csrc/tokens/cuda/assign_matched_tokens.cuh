#pragma once

#include "tokens/cuda/matched_tokens.cuh"

namespace torchops::kernels::tokens {

// The assignment [B, N]: tokens that stay are numbered in sequence order, the others follow their
// destination. A block of matched_tokens_threads per batch row.
static __global__ void assign_matched_tokens(MatchedTokens args, int64_t* assign /* [B, N] */) {
  const int64_t batch = blockIdx.x;
  int64_t* groups = assign + batch * args.num_tokens;
  const auto threads = static_cast<int64_t>(blockDim.x);
  // Until the tokens that stay are numbered: 0 for those, -1 for dropped ones, -2 - destination for the rest.
  for (int64_t i = threadIdx.x; i < args.num_tokens; i += threads) {
    groups[i] = 0;
  }
  const device::BlockMemory memory;
  const auto merge = [&](int64_t source, int64_t destination, int32_t) {
    // The destination's number is not known yet.
    groups[source] = -2 - destination;
  };
  const auto drop = [&](int64_t position, int32_t) {
    // It follows nobody.
    groups[position] = -1;
  };
  for_removed_tokens(args, memory, merge, drop);

  int64_t numbered = 0;
  for (int64_t first = 0; first < args.num_tokens; first += threads) {
    const int64_t i = first + threadIdx.x;
    const bool stays = i < args.num_tokens && groups[i] == 0;
    int32_t count;
    const int64_t number = numbered + device::exclusive_sum(stays ? 1 : 0, memory.sums, count);
    numbered += count;
    if (stays) {
      groups[i] = number;
    }
  }
  device::syncthreads();
  for (int64_t i = threadIdx.x; i < args.num_tokens; i += threads) {
    if (groups[i] < -1) {
      groups[i] = groups[-2 - groups[i]];
    }
  }
}

}  // namespace torchops::kernels::tokens
