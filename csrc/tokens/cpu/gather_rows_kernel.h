#pragma once

#include "core/cpu/level.h"
#include "core/cpu/rows.h"
#include "core/cpu/scalar.h"

namespace torchops::kernels::tokens {

// output[b, i] = scale[b, i] * source[b, assign[b, i]] + residual[b, i], where a token with
// assign -1 takes part with its residual only.
template <typename T>
struct GatherRows {
  Rows<const T> source;          // [B, M, C]
  const int64_t* assign;         // [B, N], in -1..M-1
  const accumulate_t<T>* scale;  // [B, N], or null for 1
  Rows<const T> residual;        // [B, N, C]; data null for none
  T* output;                     // [B, N, C]
  int64_t num_tokens;            // N
  int64_t num_channels;          // C
};

// Units are tokens, b * N + i.
#define TORCHOPS_DECLARE(level)                                            \
  namespace level {                                                        \
  template <typename T>                                                    \
  void gather_rows(const GatherRows<T>& args, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::tokens
