#pragma once

#include "core/attention/attention.h"
#include "core/cpu/tile_operands.h"

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// Whether tiles compute this: fewer queries than a tile has rows are the vectors' work. The backward computes scores as
// the forward did, and delta as it computes dP, so that all ask here, and of nothing but what all of them know.
template <typename T>
constexpr bool uses_tiles(const attention::Sizes& sizes) {
  return is_pair<multiplicand_t<T>> && sizes.num_queries >= tile_side;
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
