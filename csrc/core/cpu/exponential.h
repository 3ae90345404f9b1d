#pragma once

#include "core/cpu/simd.h"

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// e^x for x <= 88, to 3e-7 and 1e-7 |x|; exactly 1 for 0, and 0 where the result is no normal number. NaN stays NaN.
inline vfloat exp(vfloat x) {
  // The two products with log2(e) become parts of fused multiplications and additions.
  constexpr float log2_e = 0x1.715476p+0f;
  // Adding it to a float of magnitude below 2^22 rounds that to an integer, which stands in the last bits.
  constexpr float rounding = 0x1.8p23f;
  const vfloat rounded = x * log2_e + rounding;
  const vfloat fraction = x * log2_e - (rounded - rounding);  // in -1/2..1/2
  // 2^fraction. Smallest maximum of the relative error among the polynomials of degree 5 with 1 at 0.
  vfloat power = fraction * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  power = power * fraction + 0x1.c6b752p-5f;
  power = power * fraction + 0x1.ebf9bcp-3f;
  power = power * fraction + 0x1.62e42ap-1f;
  power = power * fraction + 1.0f;
  const vfloat scaled = bit_cast<vfloat>(bit_cast<vuint>(power) + (bit_cast<vuint>(rounded) << 23));
  const vfloat result = x == x ? scaled : x;
  return x < -0x1.5d589ep+6f ? vfloat{} : result;  // 126 log(2)
}

inline vec<double> exp(vec<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) {
    x[lane] = __builtin_exp(x[lane]);
  }
  return x;
}

template <typename A>
A exp_of(A x) {
  return exp(broadcast(x))[0];
}

inline float log(float x) {
  return __builtin_logf(x);
}
inline double log(double x) {
  return __builtin_log(x);
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
