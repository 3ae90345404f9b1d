#pragma once

#include "core/cuda/device.cuh"

// What the threads of a block compute together. Every thread of the block calls these functions at the
// same place; shared arrays come from the caller and may be used again behind the call.

namespace torchops::device {

inline constexpr int max_warps = 32;

// The shared memory of the functions below, for kernels that need no other.
struct BlockMemory {
  int32_t* sums;       // [max_warps]
  int32_t* histogram;  // [256 + 2]

  static constexpr size_t bytes = shared_size<int32_t>(max_warps) + shared_size<int32_t>(256 + 2);

  __device__ BlockMemory() {
    SharedMemory memory;
    sums = memory.take<int32_t>(max_warps);
    histogram = memory.take<int32_t>(256 + 2);
  }
};

__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / warp_size;
}
__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % warp_size;
}

// The sum of `value` over the lanes of a warp up to this one.
__device__ inline int32_t inclusive_sum_of_warp(int32_t value) {
  const int lane = lane_index();
  for (int distance = 1; distance < warp_size; distance *= 2) {
    const int32_t before = shuffle_up(value, distance);
    value += lane >= distance ? before : 0;
  }
  return value;
}

// The sum of `value` over the lanes of a warp, in every lane.
template <typename T>
__device__ inline T sum_of_warp(T value) {
  for (int bits = warp_size / 2; bits > 0; bits /= 2) {
    value += shuffle_xor(value, bits);
  }
  return value;
}

// The sum of `value` over the threads before this one; `total` gets the sum over all of them.
__device__ inline int32_t exclusive_sum(int32_t value, int32_t* shared /* [max_warps] */, int32_t& total) {
  const int warp = warp_index(), lane = lane_index();
  const int num_warps = static_cast<int>(blockDim.x) / warp_size;
  const int32_t inclusive = inclusive_sum_of_warp(value);
  if (lane == warp_size - 1) {
    shared[warp] = inclusive;
  }
  syncthreads();
  int32_t before_warp = 0;
  total = 0;
  for (int other = 0; other < num_warps; ++other) {
    before_warp += other < warp ? shared[other] : 0;
    total += shared[other];
  }
  syncthreads();
  return before_warp + inclusive - value;
}

// The k largest of some keys are those above `threshold` and the first `ties` that equal it.
struct Selection {
  uint64_t threshold;
  int32_t ties;
};

// key(i) for i in 0..count-1, below 2^key_bits, 1 <= k <= count: digit by digit, from the highest, the k-th largest
// key.
template <int key_bits = 64, typename Key>
__device__ Selection select_largest(const Key& key, int32_t count, int32_t k, int32_t* shared /* [256 + 2] */) {
  int32_t* const histogram = shared;
  int32_t* const found = shared + 256;  // the digit, and how many keys with it are still to take
  Selection selection{0, k};
  uint64_t known_digits = 0;
  for (int shift = key_bits - 8; shift >= 0; shift -= 8) {
    for (int digit = static_cast<int>(threadIdx.x); digit < 256; digit += static_cast<int>(blockDim.x)) {
      histogram[digit] = 0;
    }
    syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += static_cast<int32_t>(blockDim.x)) {
      const uint64_t value = key(i);
      if ((value & known_digits) == selection.threshold) {
        atomic_add(&histogram[value >> shift & 255], 1);
      }
    }
    syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      int32_t wanted = selection.ties;
      while (histogram[digit] < wanted) {
        wanted -= histogram[digit--];
      }
      found[0] = digit;
      found[1] = wanted;
    }
    syncthreads();
    selection.threshold |= static_cast<uint64_t>(found[0]) << shift;
    selection.ties = found[1];
    known_digits |= uint64_t{255} << shift;
  }
  syncthreads();
  return selection;
}

}  // namespace torchops::device
