#pragma once

#include "core/rows.h"
#include "core/scalar.h"

namespace torchops::kernels::tokens {

// The gradient of merge_tokens to its weights. With group m = assign[b, i] and total S = total[b, m]:
//   grad_weight[b, i] = <input_i - merged_m, grad_merged_m> / S + grad_total_m   where normalised,
//   grad_weight[b, i] = <input_i, grad_merged_m> + grad_total_m                  otherwise (or S = 0),
// and 0 for dropped tokens.
template <typename T>
struct WeightGradient {
  Rows<const T> input;                // [B, N, C]
  Rows<const T> merged;               // [B, M, C]
  Rows<const T> grad_merged;          // [B, M, C]
  const accumulate_t<T>* grad_total;  // [B, M]
  const accumulate_t<T>* total;       // [B, M]
  const int64_t* assign;              // [B, N], in -1..M-1
  accumulate_t<T>* grad_weight;       // [B, N]
  int64_t num_tokens;                 // N
  int64_t num_groups;                 // M
  int64_t num_channels;               // C
  bool normalize;
};

}  // namespace torchops::kernels::tokens
