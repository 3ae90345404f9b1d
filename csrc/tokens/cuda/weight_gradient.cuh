#pragma once

#include "core/cuda/block.cuh"
#include "tokens/weight_gradient.h"

namespace torchops::kernels::tokens {

inline constexpr int weight_gradient_threads = 64;

// A block of weight_gradient_threads per group, grid [B * M]; its warps take the members by turns.
template <typename T>
__global__ void weight_gradient(WeightGradient<T> args) {
  using A = accumulate_t<T>;
  const int lane = device::lane_index();
  const int64_t unit = blockIdx.x;
  const int64_t batch = unit / args.num_groups;
  const int64_t group = unit % args.num_groups;
  const int64_t* offsets = args.offsets + batch * (args.num_groups + 1) + group;
  const int64_t* members = args.members + batch * args.num_tokens + offsets[0];
  const int64_t count = offsets[1] - offsets[0];
  A* grad_weight = args.grad_weight + batch * args.num_tokens;
  const bool normalized = args.normalized(unit);

  for (int64_t i = device::warp_index(); i < count; i += weight_gradient_threads / device::warp_size) {
    A sum = 0;
    if (args.num_channels > 0) {  // rows of nothing may have no address
      const T* row = args.input.row(batch, members[i]);
      const T* first = args.input.row(batch, members[0]);
      const T* grad = args.grad_merged.row(batch, group);
      for (int64_t c = lane; c < args.num_channels; c += device::warp_size) {
        A subtracted = normalized ? device::widen(first[c]) : A(0);
        // An infinity of the first member stays its own.
        subtracted = subtracted - subtracted == A(0) ? subtracted : A(0);
        sum += (device::widen(row[c]) - subtracted) * device::widen(grad[c]);
      }
    }
    sum = device::sum_of_warp(sum);
    if (lane == 0) {
      grad_weight[members[i]] = sum;
    }
  }
  device::syncthreads();

  double mean = 0;
  if (normalized) {
    for (int64_t i = lane; i < count; i += device::warp_size) {
      mean += static_cast<double>(args.weight_of(batch, members[i])) * static_cast<double>(grad_weight[members[i]]);
    }
    mean = device::sum_of_warp(mean) / static_cast<double>(args.total[unit]);
  }
  device::syncthreads();
  const A divisor = normalized ? args.total[unit] : A(1);
  const A grad_total = args.grad_total == nullptr ? A(0) : args.grad_total[unit];
  for (int64_t i = threadIdx.x; i < count; i += weight_gradient_threads) {
    grad_weight[members[i]] = (grad_weight[members[i]] - static_cast<A>(mean)) / divisor + grad_total;
  }
}

}  // namespace torchops::kernels::tokens
