#include "core/library.h"
#include "tokens/cpu/moving.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("unmerge_tokens", unmerge_tokens_on<CpuTokens>);
  m.impl("_unmerge_tokens_backward", unmerge_tokens_backward_on<CpuTokens>);
}

}  // namespace torchops
