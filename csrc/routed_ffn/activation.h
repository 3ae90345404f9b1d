#pragma once

#include "core/scalar.h"
#include "routed_ffn/grouped_product.h"

// What stands between the two layers of a feed-forward layer, and its derivative.

namespace torchops::kernels::routed_ffn {

enum class ActivationKind { relu, relu2, gelu, gelu_tanh, silu };
// Where the gates and values of gated units are. Those of weights of their own are side by side, too.
enum class GatedUnits { none, side_by_side, interleaved };

struct Activation {
  ActivationKind kind;
  GatedUnits units;
  double alpha;
  double limit;  // infinity for none
  double up_offset;

  constexpr int64_t preactivations(int64_t size) const { return units == GatedUnits::none ? size : 2 * size; }
};

// hidden[i] = activation of preactivation[i], for rows 0..num_rows - 1 of which those behind the last offset may be
// left out. Where sums come wide, they are rounded to `preactivation` first.
template <typename T>
struct Activate {
  Activation activation;
  Groups groups;
  int64_t size;                               // of hidden rows
  const accumulate_t<T>* wide_preactivation;  // [num_rows, preactivations], or null
  T* preactivation;                           // [num_rows, preactivations]; written where the wide one is given
  T* hidden;                                  // rows hidden_stride apart; may be the first columns of preactivation
  int64_t hidden_stride;
};

// Of grad_hidden[i] = scale[i] * output_gradient[i] + plain_gradient[i]:
//   grad_preactivation[i] = derivative at preactivation[i] times grad_hidden[i]
//   hidden[i] = scale[i] * activation of preactivation[i]
//   dots[order[i]] += <activation of preactivation[i], output_gradient[i]>
template <typename T>
struct ActivateBackward {
  Activation activation;
  Groups groups;
  int64_t size;
  const T* preactivation;                       // [num_rows, preactivations]
  const accumulate_t<T>* wide_output_gradient;  // [num_rows, size], or null
  const T* output_gradient;                     // where the wide one is null
  const accumulate_t<T>* plain_gradient;        // [num_rows, size], or null
  const accumulate_t<T>* scale;                 // [num_entries] by place in index, or null for 1
  const int32_t* order;                         // [num_rows]
  T* grad_preactivation;                        // [num_rows, preactivations], or null
  T* hidden;                                    // [num_rows, size], or null; may be output_gradient
  accumulate_t<T>* dots;                        // [num_entries], or null
};

}  // namespace torchops::kernels::routed_ffn
