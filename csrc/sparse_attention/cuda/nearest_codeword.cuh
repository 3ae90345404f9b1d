#pragma once

#include <limits>

#include "core/cuda/device.cuh"
#include "sparse_attention/cuda/launches.h"

namespace torchops::kernels::sparse_attention {

inline constexpr int nearest_codeword_threads = 128;

// A thread for each row and subspace. Those of a warp have neighbouring rows and read the same codewords.
template <typename T>
__global__ void nearest_codeword(NearestCodeword<T> args) {
  using A = accumulate_t<T>;
  const Parts<T>& parts = args.parts;
  const int64_t padded = parts.padded();
  const int64_t m = blockIdx.x % parts.num_subspaces;
  const int64_t row = blockIdx.x / parts.num_subspaces * nearest_codeword_threads + threadIdx.x;
  if (row >= parts.num_rows) {
    return;
  }
  const T* const part = parts.part(row, m);
  A smallest = std::numeric_limits<A>::infinity();
  int64_t code = 0;
  for (int64_t first = 0; first < padded; first += codeword_group) {
    A distances[codeword_group] = {};
    for (int64_t c = 0; c < parts.subspace; ++c) {
      const A channel = device::widen(part[c]);
      const A* const codewords = parts.codebook(m) + c * padded + first;
#pragma unroll
      for (int e = 0; e < codeword_group; ++e) {
        const A difference = channel - codewords[e];
        distances[e] += difference < A(0) ? -difference : difference;
      }
    }
#pragma unroll
    for (int e = 0; e < codeword_group; ++e) {
      if (distances[e] < smallest) {  // false for a NaN
        smallest = distances[e];
        code = first + e;
      }
    }
  }
  args.code(row, m) = static_cast<uint8_t>(code);
}

}  // namespace torchops::kernels::sparse_attention
