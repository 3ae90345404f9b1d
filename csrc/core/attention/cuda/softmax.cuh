#pragma once

#include <cmath>
#include <limits>

#include "core/attention/attention.h"
#include "core/cuda/device.cuh"

// Scores, probabilities and their gradients.

namespace torchops::kernels::attention {

template <typename A>
inline constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

// e^value, exactly 1 for 0.
template <typename A>
__device__ __forceinline__ A exponential(A value) {
  return device::fast_exp2(value * A(1.4426950408889634074));
}

// A score, to the same last bit in the forward and the backward: the compiler fuses what is written as a product and a
// sum with some of what follows, and here and there differently.
template <typename A>
__device__ __forceinline__ A score_of(A product, A scale, A bias) {
  return std::fma(product, scale, bias);
}

template <typename A>
__device__ __forceinline__ A probability_of(A score, const Normalizer<A>& normalizer) {
  return exponential(device::min(score - normalizer.largest, A(0))) * normalizer.inverse_sum;
}

// The gradient to a score from the product of its value with grad_output. What has no probability has no gradient,
// whatever the hidden numbers are that it was computed with.
template <typename A>
__device__ __forceinline__ A score_gradient_of(A probability, A product, A delta) {
  return probability == A(0) ? A(0) : probability * (product - delta);
}

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
template <typename Inputs, typename T>
__device__ __forceinline__ void store_softmax(const Forward<Inputs, T>& args,
                                              const OnlineSoftmax<accumulate_t<T>>& softmax, int64_t index) {
  if (args.logsumexp != nullptr) {
    args.logsumexp[index] = softmax.logsumexp();
  }
  if (args.normalizer != nullptr) {
    args.normalizer[index] = softmax.normalizer();
  }
}

}  // namespace torchops::kernels::attention
