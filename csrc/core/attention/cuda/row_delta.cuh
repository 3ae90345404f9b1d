#pragma once

#include "core/attention/attention.h"
#include "core/cuda/pack.cuh"

namespace torchops::kernels::attention {

inline constexpr int row_delta_threads = 128;

// Summed up in ascending order: a thread for each row, grid [B * Hq * Lq / row_delta_threads]. `width` divides Dv, and
// all rows are aligned to width elements.
template <int width, typename T>
__global__ void __launch_bounds__(row_delta_threads) row_delta_fma(RowDelta<T> args) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  const int64_t row = int64_t{blockIdx.x} * row_delta_threads + threadIdx.x;
  if (row >= sizes.batch * sizes.num_heads * sizes.num_queries) {
    return;
  }
  const int64_t index = row % sizes.num_queries, head = row / sizes.num_queries;
  const T* grad = args.grad_output.row(head / sizes.num_heads, head % sizes.num_heads, index);
  const T* output = args.output.row(head / sizes.num_heads, head % sizes.num_heads, index);
  A sum = 0;
  for (int64_t column = 0; column < sizes.value_dim; column += width) {
    const auto grads = device::load_pack<width>(grad + column);
    const auto outputs = device::load_pack<width>(output + column);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      sum += device::widen(grads.element[e]) * device::widen(outputs.element[e]);
    }
  }
  args.delta[row] = sum - (args.grad_logsumexp == nullptr ? A(0) : args.grad_logsumexp[row]);
}

}  // namespace torchops::kernels::attention
