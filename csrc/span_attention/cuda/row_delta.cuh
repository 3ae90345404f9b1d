#pragma once

#include "core/cuda/pack.cuh"
#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

inline constexpr int row_delta_threads = 128;

// Neighbours in a row that a lane takes at a time, however wide it reads: the order of summation must not
// depend on the memory layout.
template <typename T>
inline constexpr int row_delta_chunk = device::widest<T>;

// `lanes` neighbouring threads, a power of two up to 32, per row; grid [B * Hq * Lq * lanes / row_delta_threads].
// `width` divides Dv, and all rows are aligned to width elements.
template <int width, typename T>
__global__ void __launch_bounds__(row_delta_threads) row_delta(RowDelta<T> args, int lanes) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  const int64_t row = (int64_t{blockIdx.x} * row_delta_threads + threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const bool valid = row < sizes.batch * sizes.num_heads * sizes.num_queries;
  A sum = 0;
  if (valid) {
    const int64_t index = row % sizes.num_queries, head = row / sizes.num_queries;
    const T* grad = args.grad_output.row(head / sizes.num_heads, head % sizes.num_heads, index);
    const T* output = args.output.row(head / sizes.num_heads, head % sizes.num_heads, index);
    constexpr int chunk = row_delta_chunk<T>;
    for (int64_t first = lane * chunk; first < sizes.value_dim; first += lanes * chunk) {
      for (int64_t column = first; column < first + chunk && column < sizes.value_dim; column += width) {
        const auto grads = device::load_pack<width>(grad + column);
        const auto outputs = device::load_pack<width>(output + column);
#pragma unroll
        for (int e = 0; e < width; ++e) {
          sum += device::widen(grads.element[e]) * device::widen(outputs.element[e]);
        }
      }
    }
  }
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    sum += device::shuffle_xor(sum, bits);
  }
  if (valid && lane == 0) {
    args.delta[row] = sum - (args.grad_logsumexp == nullptr ? A(0) : args.grad_logsumexp[row]);
  }
}

}  // namespace torchops::kernels::span_attention
