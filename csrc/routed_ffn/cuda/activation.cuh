#pragma once

#include <cmath>
#include <limits>

#include "core/cuda/device.cuh"
#include "routed_ffn/activation.h"

// The activation of a number, and of a gated unit.

namespace torchops::kernels::routed_ffn {

// Of an activation or a gated unit, its value and what it changes by.
template <typename A>
struct Slope {
  A value, derivative;
};

template <typename A>
__device__ __forceinline__ Slope<A> gelu(A x) {
  const A below = A(0.5) * std::erfc(x * A(-0.70710678118654752440));  // the share of a normal distribution
  return {x * below, below + x * A(0.39894228040143267794) * std::exp(A(-0.5) * x * x)};
}

// x sigmoid(y), for a function y of x.
template <typename A>
__device__ __forceinline__ Slope<A> times_sigmoid(A x, A y, A y_derivative) {
  const A share = 1 / (1 + std::exp(-y));
  return {x * share, share + x * share * (1 - share) * y_derivative};
}

template <typename A>
__device__ __forceinline__ Slope<A> gelu_tanh(A x) {
  constexpr A factor = A(1.59576912160573071176), cubic = A(0.044715);  // 2 sqrt(2 / pi)
  return times_sigmoid(x, factor * (x + cubic * x * x * x), factor * (1 + 3 * cubic * x * x));
}

template <typename A>
__device__ __forceinline__ Slope<A> activation_of(const Activation& activation, A x) {
  const A positive = device::max(x, A(0));
  switch (activation.kind) {
    case ActivationKind::relu:
      return {positive, x <= 0 ? A(0) : A(1)};
    case ActivationKind::relu2:
      return {positive * positive, 2 * positive};
    case ActivationKind::gelu:
      return gelu(x);
    case ActivationKind::gelu_tanh:
      return gelu_tanh(x);
    case ActivationKind::silu:
      break;
  }
  const auto alpha = static_cast<A>(activation.alpha);
  return times_sigmoid(x, alpha * x, alpha);
}

template <typename A>
struct GatedUnit {
  A value, gate_derivative, up_derivative;
};

// activation of min(gate, limit), times clamp(up, -limit, limit) + up_offset. What a limit holds has no derivative.
template <typename A>
__device__ __forceinline__ GatedUnit<A> gated_unit(const Activation& activation, A gate, A up) {
  const auto limit = static_cast<A>(activation.limit);
  const bool is_limited = limit < std::numeric_limits<A>::infinity();
  const Slope<A> slope = activation_of(activation, device::min(gate, limit));
  const A factor = device::max(device::min(up, limit), -limit) + static_cast<A>(activation.up_offset);
  return {slope.value * factor, is_limited && !(gate <= limit) ? A(0) : slope.derivative * factor,
          is_limited && !(-limit <= up && up <= limit) ? A(0) : slope.value};
}

}  // namespace torchops::kernels::routed_ffn
