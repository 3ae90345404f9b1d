#pragma once

#include "span_attention/cuda/tile.cuh"

namespace torchops::kernels::span_attention {

// The largest score of a row so far, in base 2, and the sum of 2^(score - largest).
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
    const A factor = device::fast_exp2(before - reference());
    sum *= factor;
    return factor;
  }

  // Takes the sink in, if there is one, and returns what the sum of values is to be multiplied by.
  __device__ __forceinline__ A finish(const A* sink) {
    A factor = 1;
    if (sink != nullptr) {
      const A logit = *sink * log2_e<A>;
      factor = raise(logit);
      sum += device::fast_exp2(logit - reference());
    }
    return sum == A(0) ? A(0) : factor / sum;
  }

  __device__ __forceinline__ A logsumexp() const { return (largest + device::fast_log2(sum)) / log2_e<A>; }
};

}  // namespace torchops::kernels::span_attention
