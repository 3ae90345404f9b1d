#pragma once

#include "stf/cuda/column_of_nonzero.cuh"

namespace torchops::kernels::stf::cuda {

// values[r, b, e] = dense[b, r, indices[r, b, e]]. A thread per nonzero; an index out of range gives zero.
template <typename T>
__global__ void take_nonzeros(SparseFactor<T> factor /* without values */, const T* dense /* [blocks, rows, K] */,
                              T* values /* [rows, blocks, nnz] */) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= factor.num_rows * factor.row_size()) {
    return;
  }
  const int64_t row = at / factor.row_size();
  const int64_t block = at / factor.nnz % factor.num_blocks;
  const int64_t column = column_of_nonzero(factor, at);
  values[at] = column >= 0 ? dense[(block * factor.num_rows + row) * factor.basis_size + column] : T{};
}

}  // namespace torchops::kernels::stf::cuda
