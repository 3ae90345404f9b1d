#pragma once

#include "core/cpu/level.h"
#include "tokens/gather_rows.h"

namespace torchops::kernels::tokens {

// Units are tokens, b * N + i.
#define TORCHOPS_DECLARE(level)                                            \
  namespace level {                                                        \
  template <typename T>                                                    \
  void gather_rows(const GatherRows<T>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::tokens
