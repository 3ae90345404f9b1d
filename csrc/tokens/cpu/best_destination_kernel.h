#pragma once

#include "core/cpu/level.h"
#include "tokens/best_destination.h"

namespace torchops::kernels::tokens {

// Units are blocks of sources, b * blocks_per_row() + block. Scratch, aligned to 64 bytes: the integers of `columns` =
// best_destination_columns(num_tokens) rows, two to a pair, and their inverse lengths; `positions` holds num_tokens.
#define TORCHOPS_DECLARE(level)                                                                        \
  namespace level {                                                                                    \
  template <typename T>                                                                                \
  void best_destination(const BestDestination<T>& args, int64_t begin, int64_t end, int16_t* integers, \
                        float* inverse_lengths, int64_t* positions);                                   \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

// One block of sources, and all destinations in panels of at most 64.
constexpr int64_t best_destination_columns(int64_t num_tokens) {
  return source_block + num_tokens / 2 + 1 + 64;
}
constexpr int64_t integer_pairs(int64_t num_features) {
  return (num_features + 1) / 2;
}

}  // namespace torchops::kernels::tokens
