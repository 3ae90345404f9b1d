#pragma once

#include "core/cpu/exponential.h"
#include "routed_ffn/activation.h"

namespace torchops::kernels::inline TORCHOPS_LEVEL {

template <typename A>
struct Activated {
  vec<A> value;
  vec<A> derivative;
};

// 1 / (1 + e^-x), NaN for NaN
template <typename A>
vec<A> sigmoid(vec<A> x) {
  const vec<A> power = exp(x < 0 ? x : -x);
  return (x < 0 ? power : 1 + vec<A>{}) / (1 + power);
}

struct Gaussian {
  vfloat density;
  vfloat distribution;  // the share below
};

// Of the normal distribution, to 5e-7 of the smaller of the two shares.
inline Gaussian gaussian(vfloat x) {
  constexpr float half_root = 0x1.6a09e6p-1f;  // 1 / sqrt(2)
  const vfloat distance = (x < 0 ? -x : x) * half_root;
  const vfloat power = exp(-distance * distance);
  // erfc(distance) / power as a polynomial of 1 / (1 + 0.3275 distance), without a term of degree 0; smallest maximum
  // of the relative error among those of degree 8.
  const vfloat place = 1 / (1 + 0x1.4f5c28p-2f * distance);
  vfloat ratio = place * -0x1.228e18p-3f + 0x1.002026p-1f;
  ratio = ratio * place - 0x1.a58b18p-2f;
  ratio = ratio * place + 0x1.d53de4p-2f;
  ratio = ratio * place + 0x1.773b22p-6f;
  ratio = ratio * place + 0x1.a70d9ap-3f;
  ratio = ratio * place + 0x1.71cd2ep-3f;
  ratio = ratio * place + 0x1.7ae5ccp-3f;
  const vfloat tail = 0.5f * power * place * ratio;
  constexpr float density_at_0 = 0x1.988454p-2f;  // 1 / sqrt(2 pi)
  return {density_at_0 * power, x < 0 ? tail : 1 - tail};
}

struct WideGaussian {
  vec<double> density;
  vec<double> distribution;
};

inline WideGaussian gaussian(vec<double> x) {
  WideGaussian result;
  for (int lane = 0; lane < lanes<double>; ++lane) {
    result.density[lane] = 0.39894228040143267794 * __builtin_exp(-0.5 * x[lane] * x[lane]);
    result.distribution[lane] = 0.5 * __builtin_erfc(-x[lane] * 0.70710678118654752440);
  }
  return result;
}

template <routed_ffn::ActivationKind kind, typename A>
Activated<A> activated(vec<A> x, A alpha) {
  using routed_ffn::ActivationKind;
  using V = vec<A>;
  if constexpr (kind == ActivationKind::relu) {
    return {x <= 0 ? V{} : x, x <= 0 ? V{} : 1 + V{}};
  } else if constexpr (kind == ActivationKind::relu2) {
    const V positive = x <= 0 ? V{} : x;
    return {positive * positive, 2 * positive};
  } else if constexpr (kind == ActivationKind::gelu) {
    const auto [density, distribution] = gaussian(x);
    return {x * distribution, distribution + x * density};
  } else {
    // x sigmoid(y), y a function of x
    V y, y_derivative;
    if constexpr (kind == ActivationKind::silu) {
      y = alpha * x;
      y_derivative = alpha + V{};
    } else {
      constexpr A factor = static_cast<A>(1.59576912160573071176), cubic = static_cast<A>(0.044715);  // 2 sqrt(2 / pi)
      y = factor * (x + cubic * x * x * x);
      y_derivative = factor * (1 + 3 * cubic * x * x);
    }
    const V share = sigmoid<A>(y);
    return {x * share, share + x * share * (1 - share) * y_derivative};
  }
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
