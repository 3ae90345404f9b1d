#pragma once

#include "stf/cuda/column_of_nonzero.cuh"
#include "stf/cuda/launches.h"

namespace torchops::kernels::stf::cuda {

// A thread per nonzero. An index out of range counts as zero.
template <typename T>
__global__ void value_gradient(ValueGradient<T> args) {
  const SparseFactor<T>& factor = args.factor;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= factor.num_rows * factor.row_size()) {
    return;
  }
  const int64_t row = at / factor.row_size();
  const int64_t block = at / factor.nnz % factor.num_blocks;
  const int64_t column = column_of_nonzero(factor, at);
  accumulate_t<T> sum = 0;
  if (column >= 0) {
    const T* const atoms = args.atoms + block * args.num_tokens * factor.basis_size + column;
    for (int64_t t = 0; t < args.num_tokens; ++t) {
      sum += device::widen(args.rows[t * factor.num_rows + row]) * device::widen(atoms[t * factor.basis_size]);
    }
  }
  args.grad_values[at] = device::narrow<T>(sum);
}

}  // namespace torchops::kernels::stf::cuda
