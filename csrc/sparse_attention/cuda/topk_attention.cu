#include "core/library.h"
#include "sparse_attention/cuda/device.cuh"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("topk_attention", flattened<topk_attention_on<CudaTopkAttention>>);
  m.impl("topk_attention_lse", flattened<topk_attention_lse_on<CudaTopkAttention>>);
  m.impl("_topk_attention_forward", flattened<topk_attention_forward_on<CudaTopkAttention>>);
}

}  // namespace torchops
