#pragma once

#include "core/cpu/level.h"
#include "core/scalar.h"

// The product of dense matrices. Its bits depend on the numbers and their shapes, not on how the units of work
// are split, nor on the strides of the left operand. With few rows they depend on whether the right operand lies
// along the depth or along its columns, for then it is read once, as it lies.

namespace torchops::kernels::core {

// [batches, rows, columns]; strides are counted in elements, and that of the rows or that of the columns is 1. The
// others, the rows or columns that do not lie side by side, are lines. Where an index says which, line i is the one at
// lines[i], for all batches.
template <typename T>
struct Matrices {
  const T* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;
  const int32_t* lines = nullptr;
};

// output[b, m, n] = bias[b, n] + sum over d of left[b, m, d] * right[b, d, n], or as much more than output has where it
// adds. Sums are rounded to `output`, or go unrounded to `wide_output`, with the same strides.
template <typename T>
struct DenseProduct {
  int64_t num_batches;
  int64_t num_rows;
  int64_t num_columns;
  int64_t depth;
  Matrices<T> left;
  Matrices<T> right;
  const T* bias;  // or null
  int64_t bias_batch_stride;
  T* output;  // or null
  int64_t output_batch_stride;
  int64_t output_row_stride;
  accumulate_t<T>* wide_output = nullptr;
  bool adds = false;
};

// Units are blocks of the output.
#define TORCHOPS_DECLARE(level)                                                               \
  namespace level {                                                                           \
  template <typename T>                                                                       \
  int64_t dense_product_units(const DenseProduct<T>& args);                                   \
  template <typename T>                                                                       \
  int64_t dense_product_scratch_bytes(const DenseProduct<T>& args);                           \
  template <typename T>                                                                       \
  void dense_product(const DenseProduct<T>& args, void* scratch, int64_t begin, int64_t end); \
  }
TORCHOPS_FOR_EACH_LEVEL_AND_TILES(TORCHOPS_DECLARE)
#undef TORCHOPS_DECLARE

}  // namespace torchops::kernels::core
