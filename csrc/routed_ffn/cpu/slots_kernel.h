#pragma once

#include "core/cpu/level.h"
#include "routed_ffn/slots.h"

namespace torchops::kernels::routed_ffn {

// Units are tokens, resp. rows.
#define TORCHOPS_DECLARE(level)                                        \
  namespace level {                                                    \
  template <typename T>                                                \
  void slot_sums(const SlotSums<T>& args, int64_t begin, int64_t end); \
  template <typename T>                                                \
  void slot_dots(const SlotDots<T>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::routed_ffn
