#pragma once

#include "core/cuda/block.cuh"
#include "stf/cuda/column_of_nonzero.cuh"
#include "stf/cuda/launches.h"
#include "stf/cuda/packed_value.cuh"

// A product with the factor as a dense matrix multiplies its zeros, and makes a NaN of each that meets an infinity or a
// NaN: an atom that overflows would reach rows that do not have it. Tokens with such atoms are computed anew, nonzero
// by nonzero.

namespace torchops::kernels::stf::cuda {

inline constexpr int repair_threads = 256;
inline constexpr int repair_warps = repair_threads / device::warp_size;

// Whether all atoms of a token are numbers; every thread of the block calls it.
template <typename T>
__device__ bool token_is_finite(const T* atoms, int64_t num_blocks, int64_t num_tokens, int64_t basis_size,
                                int64_t token) {
  bool is_finite = true;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const T* const of_token = atoms + (block * num_tokens + token) * basis_size;
    for (int64_t c = threadIdx.x; c < basis_size; c += blockDim.x) {
      const auto value = device::widen(of_token[c]);
      is_finite = is_finite && value - value == 0;
    }
  }
  return device::syncthreads_and(is_finite);
}

// A block per token, a warp per row. Grid [T].
template <typename T>
__global__ void repair_tokens(RepairTokens<T, SparseFactor> args) {
  using A = accumulate_t<T>;
  const SparseFactor<T>& factor = args.factor;
  const int64_t token = blockIdx.x;
  if (token_is_finite(args.atoms, factor.num_blocks, args.num_tokens, factor.basis_size, token)) {
    return;
  }
  for (int64_t row = device::warp_index(); row < factor.num_rows; row += repair_warps) {
    A sum = 0;
    for (int64_t e = device::lane_index(); e < factor.row_size(); e += device::warp_size) {
      const int64_t at = row * factor.row_size() + e;
      const int64_t column = column_of_nonzero(factor, at);
      if (column >= 0) {
        const int64_t block = e / factor.nnz;
        sum += device::widen(factor.values[at]) *
               device::widen(args.atoms[(block * args.num_tokens + token) * factor.basis_size + column]);
      }
    }
    for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
      sum += device::shuffle_xor(sum, bits);
    }
    if (device::lane_index() == 0) {
      const A bias = args.bias == nullptr ? A(0) : A(device::widen(args.bias[row]));
      args.output[token * factor.num_rows + row] = device::narrow<T>(sum + bias);
    }
  }
}

// A block per token, a warp per group, a lane per row of it. Grid [T].
template <typename T>
__global__ void repair_packed_tokens(RepairTokens<T, PackedFactor> args) {
  using A = accumulate_t<T>;
  const PackedFactor<T>& factor = args.factor;
  const int64_t token = blockIdx.x;
  if (token_is_finite(args.atoms, factor.num_blocks, args.num_tokens, factor.basis_size, token)) {
    return;
  }
  const int lane = device::lane_index();
  for (int64_t group = device::warp_index(); group < factor.num_groups(); group += repair_warps) {
    if (lane >= factor.rows_in_group(group)) {
      continue;
    }
    A sum = 0;
    for (int64_t block = 0; block < factor.num_blocks; ++block) {
      const uint16_t* const mask = factor.mask + (group * factor.num_blocks + block) * factor.basis_size;
      const T* const values = factor.values + (group * factor.num_blocks + block) * rows_per_group * factor.nnz;
      const T* const atoms = args.atoms + (block * args.num_tokens + token) * factor.basis_size;
      int32_t begin = 0;
      for (int64_t column = 0; column < factor.basis_size; ++column) {
        const uint32_t rows_of_column = mask[column];
        if ((rows_of_column >> lane & 1) != 0) {
          const int32_t at = begin + device::popc(rows_of_column & ((uint32_t{1} << lane) - 1));
          sum += device::widen(packed_value(factor, values, at)) * device::widen(atoms[column]);
        }
        begin += device::popc(rows_of_column);
      }
    }
    const int64_t row = group * rows_per_group + lane;
    const A bias = args.bias == nullptr ? A(0) : A(device::widen(args.bias[row]));
    args.output[token * factor.num_rows + row] = device::narrow<T>(sum + bias);
  }
}

}  // namespace torchops::kernels::stf::cuda
