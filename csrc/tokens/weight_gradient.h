#pragma once

#include "core/rows.h"
#include "core/scalar.h"

namespace torchops::kernels::tokens {

// The gradient of merge_tokens to its weights. With group m = assign[b, i] and total S = total[b, m]:
//   grad_weight[b, i] = (d_i - mean of d) / S + grad_total_m   where normalised,
//   grad_weight[b, i] = <input_i, grad_merged_m> + grad_total_m  otherwise (or S = 0),
// where d_i = <input_i - input_f, grad_merged_m> with the group's first member f, and the mean over the members is
// weighted. Tokens that merge are similar, and differences of rows are exact where differences of products are not.
// Dropped tokens are not written.
template <typename T>
struct WeightGradient {
  Rows<const T> input;                // [B, N, C]
  Rows<const T> grad_merged;          // [B, M, C]
  const accumulate_t<T>* grad_total;  // [B, M], or null for 0
  const accumulate_t<T>* weight;      // [B, N], or null for 1
  const accumulate_t<T>* total;       // [B, M], or null where not normalised
  const int64_t* offsets;             // [B, M + 1]: group m's members are members[offsets[m]..offsets[m+1]-1]
  const int64_t* members;             // [B, N]: tokens sorted by group, ascending in each
  accumulate_t<T>* grad_weight;       // [B, N]
  int64_t num_tokens;                 // N
  int64_t num_groups;                 // M
  int64_t num_channels;               // C; 0 where there is no grad_merged

  constexpr bool normalized(int64_t unit) const { return total != nullptr && total[unit] != accumulate_t<T>(0); }
  constexpr accumulate_t<T> weight_of(int64_t batch, int64_t token) const {
    return weight == nullptr ? accumulate_t<T>(1) : weight[batch * num_tokens + token];
  }
};

}  // namespace torchops::kernels::tokens
