#pragma once

#include "core/cpu/level.h"
#include "span_attention/attention.h"

// The forward goes over key-value heads, b * Hkv + h, in waves of consecutive ones. A wave's keys and values
// are packed first, into forward_pack_bytes for each of its heads; then tiles of queries are computed.

namespace torchops::kernels::span_attention {

#define TORCHOPS_DECLARE(level)                                                                                \
  namespace level {                                                                                            \
  template <typename T>                                                                                        \
  int64_t forward_pack_bytes(const Sizes& sizes);                                                              \
  template <typename T>                                                                                        \
  int64_t forward_scratch_bytes(const Sizes& sizes);                                                           \
  /* Units are tiles of keys of the heads of a wave: head * forward_pack_units + tile. */                      \
  template <typename T>                                                                                        \
  int64_t forward_pack_units(const Sizes& sizes);                                                              \
  template <typename T>                                                                                        \
  void forward_pack(const Attention<T>& args, int64_t first_head, void* packs, int64_t begin, int64_t end);    \
  /* Units are tiles of queries of the heads of a wave: head * forward_units + (head in group, tile). */       \
  template <typename T>                                                                                        \
  int64_t forward_units(const Sizes& sizes);                                                                   \
  template <typename T>                                                                                        \
  void forward(const AttentionForward<T>& args, int64_t first_head, void* packs, void* scratch, int64_t begin, \
               int64_t end);                                                                                   \
  }
TORCHOPS_FOR_EACH_LEVEL_AND_TILES(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::span_attention
