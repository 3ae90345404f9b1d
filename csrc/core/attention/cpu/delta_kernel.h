#pragma once

#include "core/attention/attention.h"
#include "core/cpu/level.h"

namespace torchops::kernels::attention {

// Units are rows, (b * Hq + h) * Lq + i, resp. heads.
#define TORCHOPS_DECLARE(level)                                                \
  namespace level {                                                            \
  template <typename T>                                                        \
  void row_delta(const RowDelta<T>& args, int64_t begin, int64_t end);         \
  template <typename A>                                                        \
  void sink_gradient(const SinkGradient<A>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL_AND_TILES(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::attention
