#include "core/library.h"
#include "tokens/cuda/moving.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("merge_tokens", merge_tokens_on<CudaTokens>);
  m.impl("_merge_tokens_backward", flattened<merge_tokens_backward_on<CudaTokens>>);
}

}  // namespace torchops
