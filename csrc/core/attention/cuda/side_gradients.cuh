#pragma once

#include "core/attention/cuda/launches.h"
#include "core/attention/cuda/softmax.cuh"
#include "core/cuda/block.cuh"
#include "core/cuda/launch.h"
#include "core/cuda/tiles.h"

// Gradients to the inputs that several heads or rows of the batch share, each summed up in one order.

namespace torchops::kernels::attention {

inline constexpr int sink_gradient_threads = 256;
template <typename A>
inline constexpr size_t sink_gradient_bytes = device::shared_size<A>(sink_gradient_threads / device::warp_size);

// A block per head, grid [Hq].
template <typename A>
__global__ void __launch_bounds__(sink_gradient_threads) sink_gradient(SinkGradient<A> args) {
  const Sizes& sizes = args.sizes;
  device::SharedMemory memory;
  A* of_warp = memory.take<A>(sink_gradient_threads / device::warp_size);
  const int64_t head = blockIdx.x;
  const A logit = args.sink[head];
  A sum = 0;
  for (int64_t batch = 0; batch < sizes.batch; ++batch) {
    const int64_t first = (batch * sizes.num_heads + head) * sizes.num_queries;
    for (int64_t i = threadIdx.x; i < sizes.num_queries; i += sink_gradient_threads) {
      sum -= score_gradient_of(probability_of(logit, args.normalizer[first + i]), args.delta[first + i], A(0));
    }
  }
  for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
    sum += device::shuffle_xor(sum, bits);
  }
  if (device::lane_index() == 0) {
    of_warp[device::warp_index()] = sum;
  }
  device::syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < sink_gradient_threads / device::warp_size; ++warp) {
      sum += of_warp[warp];
    }
    args.grad_sink[head] = sum;
  }
}

inline constexpr int key_bias_gradient_threads = 256;

// Sums up the heads' shares of the gradient to key_bias; a thread per key, grid [B * Lk / threads].
template <typename A>
__global__ void __launch_bounds__(key_bias_gradient_threads) key_bias_gradient(const A* shares,   // [B, Hkv, Lk]
                                                                               A* grad_key_bias,  // [B, Lk]
                                                                               Sizes sizes) {
  const int64_t unit = int64_t{blockIdx.x} * key_bias_gradient_threads + threadIdx.x;
  if (unit >= sizes.batch * sizes.num_keys) {
    return;
  }
  const int64_t first = unit / sizes.num_keys * sizes.num_kv_heads * sizes.num_keys + unit % sizes.num_keys;
  A sum = shares[first];
  for (int64_t head = 1; head < sizes.num_kv_heads; ++head) {
    sum += shares[first + head * sizes.num_keys];
  }
  grad_key_bias[unit] = sum;
}

template <typename A>
void launch_sink_gradient(const SinkGradient<A>& args) {
  device::launch({args.sizes.num_heads, sink_gradient_threads, sink_gradient_bytes<A>}, sink_gradient<A>, args);
}

template <typename A>
void launch_key_bias_gradient(const A* shares, A* grad_key_bias, const Sizes& sizes) {
  device::launch({device::tiles_of(sizes.batch * sizes.num_keys, key_bias_gradient_threads), key_bias_gradient_threads},
                 key_bias_gradient<A>, shares, grad_key_bias, sizes);
}

}  // namespace torchops::kernels::attention
