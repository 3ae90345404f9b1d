#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/scores.h"

namespace torchops::kernels::sparse_attention {

#define TORCHOPS_DECLARE(level)                                                                                  \
  namespace level {                                                                                              \
  /* Of scores and of gradients to queries, of all of them. */                                                   \
  template <typename T>                                                                                          \
  int64_t score_units(const Attention<T>& inputs);                                                               \
  /* Of each kernel; with gradients to as many keys at a time, 0 for none. */                                    \
  template <typename T>                                                                                          \
  int64_t scores_scratch_bytes(const Attention<T>& inputs, int64_t num_keys);                                    \
                                                                                                                 \
  template <typename T>                                                                                          \
  void scores(const Scores<T>& args, void* scratch, int64_t begin, int64_t end);                                 \
  template <typename T>                                                                                          \
  void score_query_gradient(const ScoreGradients<T>& args, void* scratch, int64_t begin, int64_t end);           \
  /* Units are ranges of keys_at_a_time keys, (b * Hkv + h) * ranges + range; ranges do not show in the bits. */ \
  template <typename T>                                                                                          \
  void score_key_gradient(const ScoreGradients<T>& args, int64_t keys_at_a_time, void* scratch, int64_t begin,   \
                          int64_t end);                                                                          \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
