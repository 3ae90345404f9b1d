#include "core/library.h"
#include "span_attention/cuda/device.cuh"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("_span_attention_backward", flattened<span_attention_backward_on<CudaSpanAttention>>);
}

}  // namespace torchops
