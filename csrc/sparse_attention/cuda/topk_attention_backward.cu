#include "core/library.h"
#include "sparse_attention/cuda/device.cuh"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("_topk_attention_backward", flattened<topk_attention_backward_on<CudaTopkAttention>>);
}

}  // namespace torchops
