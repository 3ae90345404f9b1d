#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/nearest_codeword.h"

namespace torchops::kernels::sparse_attention {

// Units are rows.
#define TORCHOPS_DECLARE(level)                                                      \
  namespace level {                                                                  \
  template <typename T>                                                              \
  void nearest_codeword(const NearestCodeword<T>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
