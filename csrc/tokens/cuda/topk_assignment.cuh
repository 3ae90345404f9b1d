#pragma once

#include <cstring>

#include "core/cuda/block.cuh"
#include "tokens/cuda/launches.h"

namespace torchops::kernels::tokens {

inline constexpr int topk_threads = 256;

// Numbers in their order as integers above 1; NaN is 1, so that 0 is left for padding.
template <typename T>
__device__ uint64_t ordered_bits(T score) {
  const double value = static_cast<double>(device::widen(score)) + 0.0;  // -0 and 0 are equal
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint64_t sign = uint64_t{1} << 63;
  return value != value ? 1 : (bits & sign) != 0 ? ~bits : bits | sign;
}

// A block of topk_threads per batch row.
template <typename T>
__global__ void topk_assignment(TopkAssignment<T> args) {
  const device::BlockMemory memory;
  const int64_t row = blockIdx.x * args.num_tokens + args.num_protected;
  const auto count = static_cast<int32_t>(args.num_tokens - args.num_protected);
  const auto threads = static_cast<int32_t>(blockDim.x);
  const auto is_padding = [&](int32_t i) { return args.padding != nullptr && args.padding[row + i]; };
  const auto key = [&](int32_t i) { return is_padding(i) ? uint64_t{0} : ordered_bits(args.scores[row + i]); };

  for (int64_t i = threadIdx.x; i < args.num_protected; i += threads) {
    args.assign[blockIdx.x * args.num_tokens + i] = i;
  }
  // Nothing is above this when nothing is kept.
  device::Selection selection{~uint64_t{0}, 0};
  if (args.num_kept > 0) {
    selection = device::select_largest(key, count, static_cast<int32_t>(args.num_kept), memory.histogram);
  }
  int32_t ties_before = 0;
  int64_t numbered = args.num_protected;
  for (int32_t first = 0; first < count; first += threads) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    const bool tie = i < count && key(i) == selection.threshold;
    int32_t ties, kept_here;
    const int32_t tie_rank = ties_before + device::exclusive_sum(tie ? 1 : 0, memory.sums, ties);
    const bool kept = i < count && (key(i) > selection.threshold || (tie && tie_rank < selection.ties));
    const int64_t number = numbered + device::exclusive_sum(kept ? 1 : 0, memory.sums, kept_here);
    ties_before += ties;
    numbered += kept_here;
    if (i < count) {
      args.assign[row + i] = kept ? number : args.fuse && !is_padding(i) ? args.num_protected + args.num_kept : -1;
    }
  }
}

}  // namespace torchops::kernels::tokens
