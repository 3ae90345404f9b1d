#pragma once

#include "span_attention/cpu/tiles.h"

// What the backward reads and writes of queries and keys beside their packed rows.

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

// Of the queries of `rows`, of one head, into rows from 0 on; up to padded_rows follow some whose probabilities are 0.
template <typename T>
void load_normalizers(const AttentionBackward<T>& args, int64_t batch, int64_t head, Range rows, int64_t padded_rows,
                      accumulate_t<T>* largest, accumulate_t<T>* inverse_sum, accumulate_t<T>* delta) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.inputs.sizes;
  const int64_t first = (batch * sizes.num_heads + head) * sizes.num_queries + rows.begin;
  for (int64_t row = 0; row < padded_rows; ++row) {
    const bool there = row < rows.end - rows.begin;
    const Normalizer<A> normalizer = there ? args.normalizer[first + row] : make_normalizer(A(0), A(0));
    largest[row] = normalizer.largest;
    inverse_sum[row] = normalizer.inverse_sum;
    delta[row] = there && args.delta != nullptr ? args.delta[first + row] : A(0);
  }
}

template <typename T>
void store_gradient(T* to, const accumulate_t<T>* sums, int64_t size, accumulate_t<T> factor) {
  for_each_vector<T>(size,
                     [&](int64_t d, int lanes_used) { store_piece(to + d, load(sums + d) * factor, lanes_used); });
}

// The gradients that are wanted of the keys, whose sums are rows from 0 on: of `keys`, without the scale, of `values`
// and of `bias`.
template <typename T, typename Sums>
void store_key_gradients(const AttentionBackward<T>& args, int64_t batch, int64_t kv_head, Range keys, const Sums& sums,
                         int64_t key_columns, int64_t value_columns) {
  const Sizes& sizes = args.inputs.sizes;
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    const int64_t row = key - keys.begin;
    if (args.grad_key.data != nullptr) {
      store_gradient(args.grad_key.row(batch, kv_head, key), sums.keys + row * key_columns, sizes.head_dim,
                     args.inputs.scale);
    }
    if (args.grad_value.data != nullptr) {
      store_gradient(args.grad_value.row(batch, kv_head, key), sums.values + row * value_columns, sizes.value_dim,
                     accumulate_t<T>(1));
    }
    if (args.grad_key_bias != nullptr) {
      args.grad_key_bias[(batch * sizes.num_kv_heads + kv_head) * sizes.num_keys + key] = sums.bias[row];
    }
  }
}

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
