#pragma once

#include "core/scalar.h"
#include "routed_ffn/grouped_product.h"

// From sorted rows back to tokens.

namespace torchops::kernels::routed_ffn {

// output[t] = bias + sum over slots j, ascending, of gate[t, j] * rows[places[t, j]]; rows behind the last offset add
// nothing.
template <typename T>
struct SlotSums {
  Groups groups;
  int64_t num_tokens;
  int64_t num_slots;
  int64_t size;
  const accumulate_t<T>* rows;  // [num_rows, size]
  const int32_t* places;        // [num_tokens, num_slots]
  const accumulate_t<T>* gate;  // [num_tokens, num_slots], or null for 1
  const T* bias;                // [size], or null
  T* output;                    // [num_tokens, size]
};

// dots[order[i]] += <rows[i], tokens[i]>
template <typename T>
struct SlotDots {
  Groups groups;
  int64_t size;
  const accumulate_t<T>* rows;  // [num_rows, size]
  SortedRows<T> tokens;
  const int32_t* order;  // [num_rows]
  accumulate_t<T>* dots;
};

}  // namespace torchops::kernels::routed_ffn
