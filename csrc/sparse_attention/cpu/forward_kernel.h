#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/attention.h"

namespace torchops::kernels::sparse_attention {

// Units are lists or several of them, of a head or of those that share it.
#define TORCHOPS_DECLARE(level)                                                             \
  namespace level {                                                                         \
  template <typename T>                                                                     \
  int64_t forward_units(const Attention<T>& inputs);                                        \
  template <typename T>                                                                     \
  int64_t forward_scratch_bytes(const Attention<T>& inputs);                                \
  template <typename T>                                                                     \
  void forward(const AttentionForward<T>& args, void* scratch, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
