#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/quantization_loss.h"

namespace torchops::kernels::sparse_attention {

// Units are subspaces of pieces, resp. the sums over pieces.
#define TORCHOPS_DECLARE(level)                                                                \
  namespace level {                                                                            \
  template <typename T>                                                                        \
  void quantization_loss(const QuantizationLoss<T>& args, int64_t begin, int64_t end);         \
  template <typename T>                                                                        \
  void quantization_gradient(const QuantizationGradient<T>& args, int64_t begin, int64_t end); \
  template <typename T>                                                                        \
  void sum_piece_gradients(const QuantizationGradient<T>& args, int64_t begin, int64_t end);   \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
