#pragma once

#include "core/attention/attention.h"
#include "core/cpu/exponential.h"

// What the CPU's kernels of every attention compute in the same way, row by row.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// First and last tiles by turns: where later queries see more keys, every stretch of turns costs the same.
constexpr int64_t balanced_tile(int64_t turn, int64_t num_tiles) {
  return turn % 2 == 0 ? turn / 2 : num_tiles - 1 - turn / 2;
}

// A score, computed in the same way by the forward and the backward.
template <typename A>
inline __attribute__((always_inline)) vec<A> score_of(vec<A> product, A scale, vec<A> bias) {
  return scale * product + bias;
}

// What scores are subtracted from before exp is taken: while a row has seen nothing, any number serves.
template <typename A>
inline __attribute__((always_inline)) A reference_of(A largest) {
  return largest == -static_cast<A>(__builtin_inf()) ? A(0) : largest;
}

// What the forward writes of a query, from its largest score and the sums of exp(score - largest) and of that times
// the values: brings in the sink, and divides by the sum. Without a sink `largest` may be of other numbers, `scale` of
// which are scores.
template <typename Inputs, typename T>
void finish_row(const attention::Forward<Inputs, T>& args, int64_t batch, int64_t head, int64_t query,
                accumulate_t<T> largest, accumulate_t<T> sum, const accumulate_t<T>* values,
                accumulate_t<T> scale = 1) {
  using A = accumulate_t<T>;
  const attention::Sizes& sizes = args.inputs.sizes;
  A rescale = 1;
  if (args.inputs.sink != nullptr) {
    const A sink = args.inputs.sink[head], before = largest;
    largest = sink > largest ? sink : largest;
    const A shift = reference_of(largest);
    rescale = exp_of(before - shift);
    sum = sum * rescale + exp_of(sink - shift);
  }
  const int64_t index = (batch * sizes.num_heads + head) * sizes.num_queries + query;
  if (args.logsumexp != nullptr) {
    args.logsumexp[index] = scale * largest + log(sum);
  }
  if (args.normalizer != nullptr) {
    args.normalizer[index] = attention::make_normalizer(largest, sum);
  }
  const A factor = sum == 0 ? A(0) : rescale / sum;
  T* const to = args.output.row(batch, head, query);
  for_each_vector<T>(sizes.value_dim,
                     [&](int64_t d, int lanes_used) { store_piece(to + d, load(values + d) * factor, lanes_used); });
}

// Of the queries of `rows`, of one head, into rows from 0 on; up to padded_rows follow some whose probabilities are 0.
template <typename Inputs, typename T>
void load_normalizers(const attention::Backward<Inputs, T>& args, int64_t batch, int64_t head, attention::Range rows,
                      int64_t padded_rows, accumulate_t<T>* largest, accumulate_t<T>* inverse_sum,
                      accumulate_t<T>* delta) {
  using A = accumulate_t<T>;
  const attention::Sizes& sizes = args.inputs.sizes;
  const int64_t first = (batch * sizes.num_heads + head) * sizes.num_queries + rows.begin;
  for (int64_t row = 0; row < padded_rows; ++row) {
    const bool there = row < rows.end - rows.begin;
    const auto normalizer = there ? args.normalizer[first + row] : attention::make_normalizer(A(0), A(0));
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
template <typename Inputs, typename T, typename Sums>
void store_key_gradients(const attention::Backward<Inputs, T>& args, int64_t batch, int64_t kv_head,
                         attention::Range keys, const Sums& sums, int64_t key_columns, int64_t value_columns) {
  const attention::Sizes& sizes = args.inputs.sizes;
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

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
