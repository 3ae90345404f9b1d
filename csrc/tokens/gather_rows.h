#pragma once

#include "core/rows.h"
#include "core/scalar.h"

namespace torchops::kernels::tokens {

// output[b, i] = scale * source[b, m] + residual[b, i] with m = assign[b, i] and scale = weight[b, i] / total[b, m],
// where a total of 0 does not divide. A token with assign -1 takes part with its residual only.
template <typename T>
struct GatherRows {
  Rows<const T> source;           // [B, M, C]
  const int64_t* assign;          // [B, N], in -1..M-1
  const accumulate_t<T>* weight;  // [B, N], or null for 1
  const accumulate_t<T>* total;   // [B, M], or null for 1
  Rows<const T> residual;         // [B, N, C]; data null for none
  T* output;                      // [B, N, C]
  int64_t num_tokens;             // N
  int64_t num_groups;             // M
  int64_t num_channels;           // C

  // Of token unit = b * N + i, which is in this group.
  constexpr accumulate_t<T> scale(int64_t unit, int64_t group) const {
    using A = accumulate_t<T>;
    const A numerator = weight == nullptr ? A(1) : weight[unit];
    const A divisor = total == nullptr ? A(0) : total[unit / num_tokens * num_groups + group];
    return divisor == A(0) ? numerator : numerator / divisor;
  }
};

}  // namespace torchops::kernels::tokens
