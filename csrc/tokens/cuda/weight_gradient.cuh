#pragma once

#include "core/cuda/device.cuh"
#include "tokens/cuda/assigned_group.cuh"
#include "tokens/weight_gradient.h"

namespace torchops::kernels::tokens {

// A warp per token, grid [B * N / warps of a block].
template <typename T>
__global__ void weight_gradient(WeightGradient<T> args, int64_t num_units) {
  using A = accumulate_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % device::warp_size;
  const int64_t unit = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / device::warp_size;
  const int64_t group = unit < num_units ? assigned_group(args.assign[unit], args.num_groups) : -1;
  const bool kept = group >= 0;
  const int64_t batch = unit / args.num_tokens;
  const A total = kept ? args.total[batch * args.num_groups + group] : A(0);
  const bool normalized = args.normalize && total != A(0);

  A sum = 0;
  if (kept) {
    const T* input = args.input.row(batch, unit % args.num_tokens);
    const T* merged = args.merged.row(batch, group);
    const T* grad = args.grad_merged.row(batch, group);
    for (int64_t c = lane; c < args.num_channels; c += device::warp_size) {
      const A mean = normalized ? device::widen(merged[c]) : A(0);
      sum += (device::widen(input[c]) - mean) * device::widen(grad[c]);
    }
  }
  for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
    sum += device::shuffle_xor(sum, bits);
  }
  if (lane == 0 && unit < num_units) {
    args.grad_weight[unit] =
        kept ? sum / (normalized ? total : A(1)) + args.grad_total[batch * args.num_groups + group] : A(0);
  }
}

}  // namespace torchops::kernels::tokens
