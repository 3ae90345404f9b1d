#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/attention.h"

// A key-value head is done as a whole, or its gradients to queries and to keys in two passes whose units are
// independent of each other; the bits are the same.

namespace torchops::kernels::sparse_attention {

#define TORCHOPS_DECLARE(level)                                                                                     \
  namespace level {                                                                                                 \
  /* As the backward by tiles or by queries sums up products with values; units are rows, (b * Hq + h) * Lq + i. */ \
  template <typename T>                                                                                             \
  void row_delta(const RowDelta<T>& args, bool tiles, int64_t begin, int64_t end);                                  \
                                                                                                                    \
  /* For gradients to as many keys at a time, 0 for none. */                                                        \
  template <typename T>                                                                                             \
  int64_t backward_scratch_bytes(const AttentionBackward<T>& args, int64_t num_keys);                               \
  /* All gradients; units are key-value heads, b * Hkv + h. */                                                      \
  template <typename T>                                                                                             \
  void backward_heads(const AttentionBackward<T>& args, void* scratch, int64_t begin, int64_t end);                 \
  /* Those to queries and to pair_bias of the key-value heads from first_head on; backward_query_units of each. */  \
  template <typename T>                                                                                             \
  int64_t backward_query_units(const Attention<T>& inputs);                                                         \
  template <typename T>                                                                                             \
  void backward_queries(const AttentionBackward<T>& args, int64_t first_head, void* scratch, int64_t begin,         \
                        int64_t end);                                                                               \
  /* Those to keys, values and key_bias of the heads from first_head on; units are ranges of keys_at_a_time */      \
  /* keys, head * ranges + range. */                                                                                \
  template <typename T>                                                                                             \
  void backward_keys(const AttentionBackward<T>& args, int64_t first_head, int64_t keys_at_a_time, void* scratch,   \
                     int64_t begin, int64_t end);                                                                   \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
