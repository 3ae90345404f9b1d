#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/score_choice.h"

// The choice goes over groups of queries that are multiplied with the same keys: with weights the rows of the batch,
// else their key-value heads, b * Hkv + h, in waves of consecutive ones. A wave's keys are packed first, into
// score_choice_pack_bytes for each of its groups.

namespace torchops::kernels::sparse_attention {

#define TORCHOPS_DECLARE(level)                                                                                        \
  namespace level {                                                                                                    \
  template <typename T>                                                                                                \
  int64_t score_choice_pack_bytes(const ScoreChoice<T>& args);                                                         \
  /* Units are panels of keys: group * score_choice_pack_units + panel. */                                             \
  template <typename T>                                                                                                \
  int64_t score_choice_pack_units(const ScoreChoice<T>& args);                                                         \
  template <typename T>                                                                                                \
  void score_choice_pack(const ScoreChoice<T>& args, int64_t first_group, void* packs, int64_t begin, int64_t end);    \
  /* Units are lists of a few queries: group * score_choice_units + (heads, lists). */                                 \
  template <typename T>                                                                                                \
  int64_t score_choice_units(const ScoreChoice<T>& args);                                                              \
  template <typename T>                                                                                                \
  int64_t score_choice_scratch_bytes(const ScoreChoice<T>& args);                                                      \
  template <typename T>                                                                                                \
  void choose_by_scores(const ScoreChoice<T>& args, int32_t* indices, int64_t first_group, void* packs, void* scratch, \
                        int64_t begin, int64_t end);                                                                   \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
