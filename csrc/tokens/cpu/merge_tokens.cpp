#include "core/library.h"
#include "tokens/cpu/moving.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("merge_tokens", merge_tokens_on<CpuTokens>);
  m.impl("_merge_tokens_backward", flattened<merge_tokens_backward_on<CpuTokens>>);
}

}  // namespace torchops
