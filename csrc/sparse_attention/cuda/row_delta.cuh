#pragma once

#include "sparse_attention/cuda/warp_rows.cuh"

namespace torchops::kernels::sparse_attention {

inline constexpr int row_delta_threads = 128;

// RowDelta, added up as the products of grad_output with values are. A thread for each row, grid [B * Hq * Lq /
// threads].
template <typename T>
__global__ void __launch_bounds__(row_delta_threads) row_delta(RowDelta<T> args) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  const int64_t row = int64_t{blockIdx.x} * row_delta_threads + threadIdx.x;
  if (row >= sizes.batch * sizes.num_heads * sizes.num_queries) {
    return;
  }
  const int64_t query = row % sizes.num_queries, head = row / sizes.num_queries % sizes.num_heads;
  const int64_t batch = row / sizes.num_queries / sizes.num_heads;
  const T* grad = args.grad_output.row(batch, head, query);
  const T* output = args.output.row(batch, head, query);
  A sum = 0;
  for (int64_t column = 0; column < sizes.value_dim; ++column) {
    sum += device::widen(grad[column]) * device::widen(output[column]);
  }
  args.delta[row] = sum - (args.grad_logsumexp == nullptr ? A(0) : args.grad_logsumexp[row]);
}

}  // namespace torchops::kernels::sparse_attention
