#pragma once

#include "core/cuda/block.cuh"
#include "stf/cuda/column_of_nonzero.cuh"

namespace torchops::kernels::stf::cuda {

// A warp writes columns first..first+count-1 of a row and block of the factor, zeros included, to shared memory.
// Other warps see them behind a barrier. An index that is repeated adds up in the order of the nonzeros; one out
// of range counts as zero.
template <typename T>
__device__ void expand_row(const SparseFactor<T>& factor, int64_t row, int64_t block, int64_t first, int64_t count,
                           accumulate_t<T>* columns) {
  const int lane = device::lane_index();
  for (int64_t c = lane; c < count; c += device::warp_size) {
    columns[c] = 0;
  }
  device::syncwarp();
  const int64_t begin = (row * factor.num_blocks + block) * factor.nnz;
  for (int64_t e = 0; e < factor.nnz; e += device::warp_size) {
    const bool has_nonzero = e + lane < factor.nnz;
    const int64_t index = has_nonzero ? column_of_nonzero(factor, begin + e + lane) : -1;
    const bool is_here = first <= index && index - first < count;
    const auto value = is_here ? device::widen(factor.values[begin + e + lane]) : accumulate_t<T>(0);
    // Increasing indices, which is what stf_select makes, are distinct: lanes write to different places.
    const auto previous = device::shuffle_up(static_cast<int32_t>(index), 1);
    if (device::all(lane == 0 || !has_nonzero || index > previous)) {
      if (is_here) {
        columns[index - first] += value;
      }
    } else {
      for (int turn = 0; turn < device::warp_size; ++turn) {
        if (is_here && lane == turn) {
          columns[index - first] += value;
        }
        device::syncwarp();
      }
    }
    device::syncwarp();
  }
}

}  // namespace torchops::kernels::stf::cuda
