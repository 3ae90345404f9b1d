#pragma once

#include "core/cpu/level.h"
#include "sparse_attention/code_choice.h"

namespace torchops::kernels::sparse_attention {

// Keys are looked at so many at a time.
inline constexpr int64_t keys_of_word = 64;
// Queries that read codes of keys together.
inline constexpr int64_t queries_of_choice = 4;

// key_codes are [B, Hkv, M, key_stride] with a key_stride that is a multiple of keys_of_word. Units are tiles of
// queries_of_choice queries of a head.
#define TORCHOPS_DECLARE(level)                                                                              \
  namespace level {                                                                                          \
  int64_t choose_by_codes_scratch_bytes(const CodeChoice& args);                                             \
  /* indices are [B, Hq, Lq, k]. */                                                                          \
  void choose_by_codes(const CodeChoice& args, int32_t* indices, void* scratch, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::sparse_attention
