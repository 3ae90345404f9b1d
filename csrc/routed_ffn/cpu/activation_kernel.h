#pragma once

#include "core/cpu/level.h"
#include "routed_ffn/activation.h"

namespace torchops::kernels::routed_ffn {

// Units are rows.
#define TORCHOPS_DECLARE(level)                                                        \
  namespace level {                                                                    \
  template <typename T>                                                                \
  void activate(const Activate<T>& args, int64_t begin, int64_t end);                  \
  template <typename T>                                                                \
  void activate_backward(const ActivateBackward<T>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::routed_ffn
