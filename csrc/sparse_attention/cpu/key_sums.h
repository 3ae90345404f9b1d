#pragma once

#include "core/attention/cpu/tile_gradients.h"
#include "sparse_attention/attention.h"

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

// What the keys of a range add up, in the order of the queries that list them; no memory for what nobody asks for.
template <typename E>
struct KeySums {
  using A = sum_t<E>;

  Range range = {0, 0};
  A* keys;    // [range][D, whole vectors], without the scale
  A* values;  // [range][Dv, whole vectors]
  A* bias;    // [range]

  template <typename T>
  KeySums(Arena* arena, const AttentionBackward<T>& args, int64_t num_keys) {
    const Sizes& sizes = args.inputs.sizes;
    keys = arena->take<A>(args.grad_key.data == nullptr ? 0 : num_keys * columns_of<E>(sizes.head_dim));
    values = arena->take<A>(args.grad_value.data == nullptr ? 0 : num_keys * columns_of<E>(sizes.value_dim));
    bias = arena->take<A>(args.grad_key_bias == nullptr ? 0 : num_keys);
  }

  template <typename T>
  void clear_sums(const AttentionBackward<T>& args) const {
    const int64_t num_keys = range.end - range.begin;
    if (args.grad_key.data != nullptr) {
      clear(keys, num_keys * columns_of<E>(args.inputs.sizes.head_dim));
    }
    if (args.grad_value.data != nullptr) {
      clear(values, num_keys * columns_of<E>(args.inputs.sizes.value_dim));
    }
    if (args.grad_key_bias != nullptr) {
      clear(bias, num_keys);
    }
  }
};

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
