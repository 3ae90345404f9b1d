#pragma once

#include <cstring>

#include "core/cuda/block.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

inline constexpr int select_threads = 128;

// Magnitudes as integers of the same order, a NaN above all numbers.
template <typename T>
__device__ uint64_t magnitude(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits & ((uint64_t{1} << (8 * sizeof(T) - 1)) - 1);
}

// A block of select_threads per row and block of the latent.
template <typename T>
__global__ void select(Select<T> args) {
  const device::BlockMemory memory;
  const T* const latent = args.latent + int64_t{blockIdx.x} * args.basis_size;
  const int64_t begin = int64_t{blockIdx.x} * args.nnz;
  const auto key = [&](int32_t i) { return magnitude(latent[i]); };
  const auto selection = device::select_largest<8 * sizeof(T)>(key, args.basis_size, args.nnz, memory.histogram);

  int32_t ties_before = 0, kept_before = 0;
  for (int32_t first = 0; first < args.basis_size; first += static_cast<int32_t>(blockDim.x)) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    const bool is_entry = i < args.basis_size;
    const bool is_tie = is_entry && key(i) == selection.threshold;
    int32_t ties, kept;
    const int32_t tie_rank = ties_before + device::exclusive_sum(is_tie ? 1 : 0, memory.sums, ties);
    const bool is_kept = is_entry && (key(i) > selection.threshold || (is_tie && tie_rank < selection.ties));
    const int64_t at = begin + kept_before + device::exclusive_sum(is_kept ? 1 : 0, memory.sums, kept);
    if (is_kept) {
      args.values[at] = latent[i];
      if (args.byte_indices) {
        static_cast<uint8_t*>(args.indices)[at] = static_cast<uint8_t>(i);
      } else {
        static_cast<int16_t*>(args.indices)[at] = static_cast<int16_t>(i);
      }
    }
    ties_before += ties;
    kept_before += kept;
  }
}

}  // namespace torchops::kernels::stf::cuda
