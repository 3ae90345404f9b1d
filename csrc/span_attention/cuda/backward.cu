#include "core/cuda/dtypes.h"
#include "span_attention/cuda/launches.cuh"

namespace torchops::kernels::span_attention {

#define TORCHOPS_INSTANTIATE(T)                                     \
  template void launch_row_delta(const RowDelta<T>&);               \
  template void launch_query_gradient(const AttentionBackward<T>&); \
  template void launch_key_gradient(const AttentionBackward<T>&);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::span_attention
