#pragma once

#include "core/attention/cpu/tiles.h"
#include "span_attention/attention.h"

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

// Tiles begin at multiples of their size, whatever is visible: then results do not depend on how the work is split.

// The bias of the keys from first_key on; keys behind the last have none.
template <typename T>
void load_key_bias(const Attention<T>& args, int64_t batch, int64_t first_key, int64_t count, accumulate_t<T>* bias) {
  for (int64_t key = 0; key < count; ++key) {
    const bool given = args.key_bias != nullptr && first_key + key < args.sizes.num_keys;
    bias[key] = given ? args.key_bias[batch * args.sizes.num_keys + first_key + key] : accumulate_t<T>(0);
  }
}

// What the rows of a tile see, where a tile is the same queries of one or several heads one behind the other.
struct TileSpans : TileRanges {
  TileSpans(const Span& span, const Sequence& sequence, int64_t first_query, int64_t num_queries,
            int64_t num_heads = 1) {
    for (int64_t row = 0; row < query_tile; ++row) {
      keys[row] = row < num_queries               ? visible_keys(span, sequence, first_query + row)
                  : row < num_heads * num_queries ? keys[row - num_queries]
                                                  : Range{0, 0};
    }
  }
};

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
