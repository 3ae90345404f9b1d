#include "core/cuda/dtypes.h"
#include "span_attention/cuda/launches.cuh"

namespace torchops::kernels::span_attention {

#define TORCHOPS_INSTANTIATE(T)                             \
  template void launch_forward(const AttentionForward<T>&); \
  template void launch_decode(const AttentionForward<T>&, const DecodePartials<accumulate_t<T>>&);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::span_attention
