#include "core/library.h"
#include "span_attention/cuda/device.cuh"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("span_attention", flattened<span_attention_on<CudaSpanAttention>>);
  m.impl("span_attention_lse", flattened<span_attention_lse_on<CudaSpanAttention>>);
  m.impl("_span_attention_forward", flattened<span_attention_forward_on<CudaSpanAttention>>);
}

}  // namespace torchops
