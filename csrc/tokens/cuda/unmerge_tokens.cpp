#include "core/library.h"
#include "tokens/cuda/moving.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("unmerge_tokens", unmerge_tokens_on<CudaTokens>);
  m.impl("_unmerge_tokens_backward", unmerge_tokens_backward_on<CudaTokens>);
}

}  // namespace torchops
