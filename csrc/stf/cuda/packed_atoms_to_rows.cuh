#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/pack.cuh"
#include "stf/cuda/launches.h"
#include "stf/cuda/packed_value.cuh"

namespace torchops::kernels::stf::cuda {

inline constexpr int packed_gather_threads = 256;
inline constexpr int packed_gather_warps = packed_gather_threads / device::warp_size;

template <typename T>
constexpr size_t packed_gather_shared_bytes(int tokens) {
  using A = accumulate_t<T>;
  return device::shared_size<int32_t>(packed_gather_warps) +
         device::shared_size<A>(static_cast<size_t>(packed_gather_threads * tokens)) +
         device::shared_size<A>(static_cast<size_t>(packed_gather_warps * rows_per_group * tokens));
}

// A block has a group of rows and `tokens` tokens, a warp a range of the columns. Two columns at a time, a lane has
// one row of one of them: what the lanes read of the values lies side by side. Grid [groups, T / tokens].
template <int tokens, typename T>
__global__ void packed_atoms_to_rows(PackedAtomsToRows<T> args) {
  using A = accumulate_t<T>;
  constexpr int width = tokens < device::widest<A> ? tokens : device::widest<A>;
  constexpr int group = static_cast<int>(rows_per_group);
  const int warp = device::warp_index(), lane = device::lane_index();
  device::SharedMemory memory;
  int32_t* const counts = memory.take<int32_t>(packed_gather_warps);
  A* const atoms = memory.take<A>(static_cast<size_t>(packed_gather_threads * tokens)) +
                   warp * device::warp_size * tokens;                                         // [32 columns, tokens]
  A* const sums = memory.take<A>(static_cast<size_t>(packed_gather_warps * group * tokens));  // [warps, 16, tokens]

  const PackedFactor<T>& factor = args.factor;
  const int64_t first_token = int64_t{blockIdx.y} * tokens;
  const int64_t units = (factor.basis_size + device::warp_size - 1) / device::warp_size;
  const int64_t first = units * warp / packed_gather_warps * device::warp_size;
  const int64_t end = device::min(units * (warp + 1) / packed_gather_warps * device::warp_size, factor.basis_size);
  const int row = lane % group;

  A sum[tokens] = {};
  for (int64_t block = 0; block < factor.num_blocks; ++block) {
    const uint16_t* const mask = factor.mask + (blockIdx.x * factor.num_blocks + block) * factor.basis_size;
    const T* const values = factor.values + (blockIdx.x * factor.num_blocks + block) * rows_per_group * factor.nnz;
    const T* const from = args.atoms + (block * args.num_tokens + first_token) * factor.basis_size;

    // Where the values of the warp's columns begin.
    int32_t count = 0;
    for (int64_t column = first + lane; column < end; column += device::warp_size) {
      count += device::popc(mask[column]);
    }
    for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
      count += device::shuffle_xor(count, bits);
    }
    if (lane == 0) {
      counts[warp] = count;
    }
    device::syncthreads();
    int32_t begin = 0;
    for (int other = 0; other < warp; ++other) {
      begin += counts[other];
    }
    device::syncthreads();

    for (int64_t first_column = first; first_column < end; first_column += device::warp_size) {
      const int64_t column = first_column + lane;
      const uint32_t rows_of_column = column < end ? mask[column] : 0;
      const int32_t behind = device::inclusive_sum_of_warp(device::popc(rows_of_column));
      const int32_t begin_of_column = begin + behind - device::popc(rows_of_column);
      begin += device::shuffle(behind, device::warp_size - 1);
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        atoms[lane * tokens + t] = column < end && first_token + t < args.num_tokens
                                       ? A(device::widen(from[t * factor.basis_size + column]))
                                       : A(0);
      }
      device::syncwarp();
#pragma unroll 4
      for (int pair = 0; pair < device::warp_size; pair += 2) {
        const int source = pair + lane / group;
        const uint32_t rows = device::shuffle(rows_of_column, source);
        const int32_t at = device::shuffle(begin_of_column, source) + device::popc(rows & ((uint32_t{1} << row) - 1));
        if ((rows >> row & 1) != 0) {
          const A value = device::widen(packed_value(factor, values, at));
#pragma unroll
          for (int t = 0; t < tokens; t += width) {
            const auto pack = device::load_pack<width>(atoms + source * tokens + t);
#pragma unroll
            for (int u = 0; u < width; ++u) {
              sum[t + u] += value * pack.element[u];
            }
          }
        }
      }
      device::syncwarp();
    }
  }

#pragma unroll
  for (int t = 0; t < tokens; ++t) {
    sum[t] += device::shuffle_xor(sum[t], group);
    if (lane < group) {
      sums[(warp * group + row) * tokens + t] = sum[t];
    }
  }
  device::syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < group * tokens; i += static_cast<int>(blockDim.x)) {
    const int64_t token = first_token + i / group, output_row = blockIdx.x * rows_per_group + i % group;
    if (token >= args.num_tokens || output_row >= factor.num_rows) {
      continue;
    }
    A total = args.bias == nullptr ? A(0) : A(device::widen(args.bias[output_row]));
    for (int other = 0; other < packed_gather_warps; ++other) {
      total += sums[(other * group + i % group) * tokens + i / group];
    }
    args.output[token * factor.num_rows + output_row] = device::narrow<T>(total);
  }
}

}  // namespace torchops::kernels::stf::cuda
