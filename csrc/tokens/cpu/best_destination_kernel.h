#pragma once

#include "core/cpu/level.h"
#include "tokens/best_destination.h"

namespace torchops::kernels::tokens {

// Units are blocks of sources, b * blocks_per_row() + block. `scratch` is aligned to 64 bytes and
// holds best_destination_scratch(num_tokens, num_features) floats; `positions` holds num_tokens integers.
#define TORCHOPS_DECLARE(level)                                                                     \
  namespace level {                                                                                 \
  template <typename T>                                                                             \
  void best_destination(const BestDestination<T>& args, int64_t begin, int64_t end, float* scratch, \
                        int64_t* positions);                                                        \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

// Normalised rows of one block of sources, and all destinations in panels of at most 64 columns.
inline int64_t best_destination_scratch(int64_t num_tokens, int64_t num_features) {
  return (source_block + num_tokens / 2 + 1 + 64) * num_features;
}

}  // namespace torchops::kernels::tokens
