#pragma once

#include "core/scalar.h"

// Products of rows that are sorted by group, each group with a matrix of its own.

namespace torchops::kernels::routed_ffn {

// Row i of a group's rows, offsets[group] to offsets[group + 1] - 1, is row lines[i] of data, or row i itself.
template <typename T>
struct SortedRows {
  const T* data;
  int64_t stride;        // the numbers of a row lie side by side
  const int32_t* lines;  // [num_rows], or null
};

struct Groups {
  const int32_t* offsets;  // [count + 1]
  int64_t count;
  int64_t num_rows;  // of all, those behind the last offset included
};

// output[i, n] = bias[g, n] + sum over d of left[i, d] * right[g, d, n] for each row i of a group g. Rows behind the
// last offset become zeros. Where `adds`, the sum is added to what output has, and rows behind stay as they are.
template <typename T>
struct GroupedProduct {
  Groups groups;
  int64_t num_columns;
  int64_t depth;
  SortedRows<T> left;
  const T* right;  // of depth_stride and column_stride one is 1
  int64_t right_group_stride;
  int64_t depth_stride;
  int64_t column_stride;
  const T* bias;  // or null
  int64_t bias_stride;
  T* output;                     // null where sums are not rounded:
  accumulate_t<T>* wide_output;  // null where they are
  int64_t output_stride;
  bool adds;
};

// output[g, m, n] = sum over the rows i of g of left[i, m] * right[i, n]; zeros for a group without rows.
template <typename T>
struct GroupedGradient {
  Groups groups;
  int64_t num_rows;  // of the output, as many as left has columns
  int64_t num_columns;
  SortedRows<T> left;
  SortedRows<T> right;
  T* output;
  int64_t output_group_stride;
  int64_t output_row_stride;
};

}  // namespace torchops::kernels::routed_ffn
