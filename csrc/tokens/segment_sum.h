#pragma once

#include "core/rows.h"
#include "core/scalar.h"

namespace torchops::kernels::tokens {

// Members summed in one chain of additions; the chains of a larger group are added up in order. One chain of a
// thousand equal rows has an error of a thousand roundings, and one of 2^24 ones in float32 stands still.
inline constexpr int64_t members_per_chain = 64;

// The weighted sum of each group's rows, in ascending token order:
//   total[b, m] = sum of the members' weights,  output[b, m] = sum of weight * input,
// divided by the total where `normalize` is set and the total is not 0. A normalised group of one
// member with a finite weight other than 0 is a copy of it, bit for bit. Totals are summed in float64, which is exact
// for counts.
template <typename T>
struct SegmentSum {
  Rows<const T> input;            // [B, N, C]
  const accumulate_t<T>* weight;  // [B, N], or null for 1
  const int64_t* offsets;         // [B, M + 1]: group m's members are members[offsets[m]..offsets[m+1]-1]
  const int64_t* members;         // [B, N]: tokens sorted by group, ascending in each
  T* output;                      // [B, M, C]
  accumulate_t<T>* total;         // [B, M], or null
  int64_t num_tokens;             // N
  int64_t num_groups;             // M
  int64_t num_channels;           // C
  bool normalize;

  // Whether a group of one member with this weight is a copy of it.
  constexpr bool is_copy(accumulate_t<T> total) const {
    return normalize ? total != 0 && total - total == 0 : total == 1;
  }
};

}  // namespace torchops::kernels::tokens
