#pragma once

#include "core/cpu/level.h"
#include "span_attention/attention.h"

// The backward goes over key-value heads, b * Hkv + h, in waves of consecutive ones. A wave's rows are packed
// first, into backward_pack_bytes for each of its heads. Then a head is done as a whole, or its gradients to
// queries and to keys in two passes whose tiles are independent of each other; the bits are the same.

namespace torchops::kernels::span_attention {

#define TORCHOPS_DECLARE(level)                                                                                        \
  namespace level {                                                                                                    \
  template <typename T>                                                                                                \
  int64_t backward_pack_bytes(const Sizes& sizes);                                                                     \
  /* Units are tiles of keys and of queries of the heads of a wave: head * backward_pack_units + tile. */              \
  template <typename T>                                                                                                \
  int64_t backward_pack_units(const Sizes& sizes);                                                                     \
  template <typename T>                                                                                                \
  void backward_pack(const AttentionBackward<T>& args, int64_t first_head, void* packs, int64_t begin, int64_t end);   \
                                                                                                                       \
  template <typename T>                                                                                                \
  int64_t backward_scratch_bytes(const Sizes& sizes, bool whole_heads);                                                \
  /* All gradients; units are the heads of a wave. */                                                                  \
  template <typename T>                                                                                                \
  void backward_heads(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin, \
                      int64_t end);                                                                                    \
  /* Units are tiles of queries: head * backward_query_units + (head in group, tile). */                               \
  template <typename T>                                                                                                \
  int64_t backward_query_units(const Sizes& sizes);                                                                    \
  template <typename T>                                                                                                \
  void backward_queries(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch,              \
                        int64_t begin, int64_t end);                                                                   \
  /* Units are tiles of keys: head * backward_key_units + tile. */                                                     \
  template <typename T>                                                                                                \
  int64_t backward_key_units(const Sizes& sizes);                                                                      \
  template <typename T>                                                                                                \
  void backward_keys(const AttentionBackward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin,  \
                     int64_t end);                                                                                     \
  }
TORCHOPS_FOR_EACH_LEVEL_AND_TILES(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::span_attention
