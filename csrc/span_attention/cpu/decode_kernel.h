#pragma once

#include "core/cpu/level.h"
#include "span_attention/attention.h"

// The forward of few queries and many keys (decoding), without a backward. The queries of all heads that share a
// key-value head are its rows, which read each key and each value together, where they lie. The keys that they see are
// cut into pieces; decode() computes what each piece gives, decode_merge() makes the output of that. How many pieces
// there are depends on sizes and the span alone, so that results do not depend on the number of threads.

namespace torchops::kernels::span_attention {

#define TORCHOPS_DECLARE(level)                                                                         \
  namespace level {                                                                                     \
  /* Pieces for each key-value head, or 0 where the kernels of forward_kernel.h are the faster ones. */ \
  template <typename T>                                                                                 \
  int64_t decode_pieces(const Attention<T>& args);                                                      \
  /* Of what all pieces give. */                                                                        \
  template <typename T>                                                                                 \
  int64_t decode_partial_bytes(const Attention<T>& args);                                               \
  template <typename T>                                                                                 \
  int64_t decode_scratch_bytes(const Attention<T>& args);                                               \
  /* Units are pieces: (b * Hkv + head) * decode_pieces + piece. */                                     \
  template <typename T>                                                                                 \
  void decode(const Attention<T>& args, void* partials, void* scratch, int64_t begin, int64_t end);     \
  /* Units are rows of the output: (b * Hq + head) * Lq + query. It overwrites their partials. */       \
  template <typename T>                                                                                 \
  void decode_merge(const AttentionForward<T>& args, void* partials, int64_t begin, int64_t end);       \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::span_attention
