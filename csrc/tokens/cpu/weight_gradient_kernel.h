#pragma once

#include "core/cpu/level.h"
#include "tokens/weight_gradient.h"

namespace torchops::kernels::tokens {

// Units are groups, b * M + m.
#define TORCHOPS_DECLARE(level)                                                    \
  namespace level {                                                                \
  template <typename T>                                                            \
  void weight_gradient(const WeightGradient<T>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::tokens
