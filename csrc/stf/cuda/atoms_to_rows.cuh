#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/pack.cuh"
#include "stf/cuda/column_of_nonzero.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

inline constexpr int gather_threads = 256;
inline constexpr int rows_of_warp = 4;
inline constexpr int64_t gather_rows = gather_threads / device::warp_size * rows_of_warp;

template <typename T>
constexpr size_t gather_shared_bytes(int64_t chunk, int tokens) {
  return device::shared_size<accumulate_t<T>>(static_cast<size_t>(chunk * tokens));
}

// A block has gather_rows rows and `tokens` tokens, a warp rows_of_warp rows, whose nonzeros are spread over the
// lanes. Grid [rows / gather_rows, T / tokens]. An index out of range counts as zero.
template <int tokens, typename T>
__global__ void atoms_to_rows(AtomsToRows<T> args) {
  using A = accumulate_t<T>;
  constexpr int width = tokens < device::widest<A> ? tokens : device::widest<A>;
  device::SharedMemory memory;
  A* const atoms = memory.take<A>(static_cast<size_t>(args.chunk * tokens));  // [chunk, tokens]
  const SparseFactor<T>& factor = args.factor;
  const int64_t first_token = int64_t{blockIdx.y} * tokens;
  const int64_t first_row = int64_t{blockIdx.x} * gather_rows + device::warp_index() * rows_of_warp;

  A sum[rows_of_warp][tokens] = {};
  for (int64_t block = 0; block < factor.num_blocks; ++block) {
    const T* const from = args.atoms + (block * args.num_tokens + first_token) * factor.basis_size;
    for (int64_t first = 0; first < factor.basis_size; first += args.chunk) {
      const int64_t count = device::min(args.chunk, factor.basis_size - first);
      for (int64_t c = threadIdx.x; c < count; c += blockDim.x) {
        for (int t = 0; t < tokens; ++t) {
          atoms[c * tokens + t] =
              first_token + t < args.num_tokens ? device::widen(from[t * factor.basis_size + first + c]) : A(0);
        }
      }
      device::syncthreads();
      for (int64_t e = device::lane_index(); e < factor.nnz; e += device::warp_size) {
#pragma unroll
        for (int i = 0; i < rows_of_warp; ++i) {
          if (first_row + i >= factor.num_rows) {
            continue;
          }
          const int64_t at = ((first_row + i) * factor.num_blocks + block) * factor.nnz + e;
          const int64_t column = column_of_nonzero(factor, at) - first;
          if (column < 0 || column >= count) {
            continue;
          }
          const A value = device::widen(factor.values[at]);
#pragma unroll
          for (int t = 0; t < tokens; t += width) {
            const auto pack = device::load_pack<width>(atoms + column * tokens + t);
#pragma unroll
            for (int u = 0; u < width; ++u) {
              sum[i][t + u] += value * pack.element[u];
            }
          }
        }
      }
      device::syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < rows_of_warp; ++i) {
    const int64_t row = first_row + i;
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
        sum[i][t] += device::shuffle_xor(sum[i][t], bits);
      }
      if (device::lane_index() == 0 && row < factor.num_rows && first_token + t < args.num_tokens) {
        const A bias = args.bias == nullptr ? A(0) : A(device::widen(args.bias[row]));
        args.output[(first_token + t) * factor.num_rows + row] = device::narrow<T>(sum[i][t] + bias);
      }
    }
  }
}

}  // namespace torchops::kernels::stf::cuda
