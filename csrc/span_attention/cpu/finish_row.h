#pragma once

#include "core/cpu/exponential.h"
#include "span_attention/attention.h"

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

// What the forward writes of a query, from its largest score and the sums of exp(score - largest) and of that times
// the values: brings in the sink, and divides by the sum.
template <typename T>
void finish_row(const AttentionForward<T>& args, int64_t batch, int64_t head, int64_t query, accumulate_t<T> largest,
                accumulate_t<T> sum, const accumulate_t<T>* values) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.inputs.sizes;
  A rescale = 1;
  if (args.inputs.sink != nullptr) {
    const A sink = args.inputs.sink[head], before = largest;
    largest = sink > largest ? sink : largest;
    const A shift = largest == -static_cast<A>(__builtin_inf()) ? A(0) : largest;
    rescale = exp_of(before - shift);
    sum = sum * rescale + exp_of(sink - shift);
  }
  const int64_t index = (batch * sizes.num_heads + head) * sizes.num_queries + query;
  if (args.logsumexp != nullptr) {
    args.logsumexp[index] = largest + log(sum);
  }
  if (args.normalizer != nullptr) {
    args.normalizer[index] = make_normalizer(largest, sum);
  }
  const A factor = sum == 0 ? A(0) : rescale / sum;
  T* const to = args.output.row(batch, head, query);
  for_each_vector<T>(sizes.value_dim,
                     [&](int64_t d, int lanes_used) { store_piece(to + d, load(values + d) * factor, lanes_used); });
}

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
