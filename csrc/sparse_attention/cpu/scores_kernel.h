#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/scores.h"

namespace torchops::kernels::sparse_attention {

#define TORCHOPS_DECLARE(level)                                                                                     \
  namespace level {                                                                                                 \
  /* Of the queries of a head. */                                                                                   \
  int64_t score_tiles(const Sizes& sizes);                                                                          \
                                                                                                                    \
  /* Units are tiles, (b * Hq + h) * score_tiles + tile. */                                                         \
  template <typename T>                                                                                             \
  int64_t scores_scratch_bytes(const Attention<T>& inputs);                                                         \
  template <typename T>                                                                                             \
  void scores(const Scores<T>& args, void* scratch, int64_t begin, int64_t end);                                    \
                                                                                                                    \
  /* Units are tiles. */                                                                                            \
  template <typename T>                                                                                             \
  int64_t score_query_gradient_scratch_bytes(const Attention<T>& inputs);                                           \
  template <typename T>                                                                                             \
  void score_query_gradient(const ScoreGradients<T>& args, void* scratch, int64_t begin, int64_t end);              \
                                                                                                                    \
  /* Units are ranges of keys_at_a_time keys, (b * Hkv + h) * ranges + range. What a key adds up has the same bits */ \
  /* for any ranges. */                                                                                             \
  template <typename T>                                                                                             \
  int64_t score_key_gradient_scratch_bytes(const Attention<T>& inputs, int64_t keys_at_a_time);                     \
  template <typename T>                                                                                             \
  void score_key_gradient(const ScoreGradients<T>& args, int64_t keys_at_a_time, void* scratch, int64_t begin,      \
                          int64_t end);                                                                             \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
