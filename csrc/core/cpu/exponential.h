#pragma once

#include "core/cpu/simd.h"

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// 2^x for x <= 127, to 2e-7; exactly 1 for 0, and 0 where the result is no normal number. NaN stays NaN.
inline vfloat exp2(vfloat x) {
  // Adding it to a float of magnitude below 2^22 rounds that to an integer, which stands in the last bits.
  constexpr float rounding = 0x1.8p23f;
  const vfloat rounded = x + rounding;
  const vfloat fraction = x - (rounded - rounding);  // in -1/2..1/2
  // Smallest maximum of the relative error among the polynomials of degree 5 with 1 at 0.
  vfloat power = fraction * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  power = power * fraction + 0x1.c6b752p-5f;
  power = power * fraction + 0x1.ebf9bcp-3f;
  power = power * fraction + 0x1.62e42ap-1f;
  power = power * fraction + 1.0f;
  const vfloat scaled = bit_cast<vfloat>(bit_cast<vuint>(power) + (bit_cast<vuint>(rounded) << 23));
  const vfloat result = x == x ? scaled : x;
  return x < -126.0f ? vfloat{} : result;
}

inline vec<double> exp2(vec<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) {
    x[lane] = __builtin_exp2(x[lane]);
  }
  return x;
}

template <typename A>
A exp2_of(A x) {
  return exp2(broadcast(x))[0];
}

inline float log2(float x) {
  return __builtin_log2f(x);
}
inline double log2(double x) {
  return __builtin_log2(x);
}

template <typename A>
inline constexpr A log2_e = A(1.44269504088896340735992468100189214L);

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
