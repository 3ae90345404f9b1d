#pragma once

#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

// The largest score of a row so far, and the sum of exp(score - largest).
template <typename A>
struct OnlineSoftmax {
  A largest = minus_infinity<A>;
  A sum = 0;

  // What powers are taken of is score - reference(): -inf, where a row has seen no key, has no distances.
  __device__ __forceinline__ A reference() const { return largest == minus_infinity<A> ? A(0) : largest; }

  // Admits scores up to `score`; returns what has been summed up so far is to be multiplied by.
  __device__ __forceinline__ A raise(A score) {
    const A before = largest;
    largest = device::max(largest, score);
    const A factor = exponential(before - reference());
    sum *= factor;
    return factor;
  }

  // Takes the sink in, if there is one, and returns what the sum of values is to be multiplied by.
  __device__ __forceinline__ A finish(const A* sink) {
    A factor = 1;
    if (sink != nullptr) {
      factor = raise(*sink);
      sum += exponential(*sink - reference());
    }
    return sum == A(0) ? A(0) : factor / sum;
  }

  __device__ __forceinline__ A logsumexp() const {
    return largest + device::fast_log2(sum) * A(0.69314718055994530942);
  }
  __device__ __forceinline__ Normalizer<A> normalizer() const { return make_normalizer(largest, sum); }
};

// Writes what others want of a row whose softmax is finished.
template <typename T>
__device__ __forceinline__ void store_softmax(const AttentionForward<T>& args,
                                              const OnlineSoftmax<accumulate_t<T>>& softmax, int64_t index) {
  if (args.logsumexp != nullptr) {
    args.logsumexp[index] = softmax.logsumexp();
  }
  if (args.normalizer != nullptr) {
    args.normalizer[index] = softmax.normalizer();
  }
}

}  // namespace torchops::kernels::span_attention
