#pragma once

#include "core/cpu/simd.h"

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// Another number than the larger of the two where one is NaN: the second.
inline vfloat larger(vfloat one, vfloat other) {
  return bit_cast<vfloat>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(one), bit_cast<__m512>(other)));
}

inline vfloat smaller(vfloat one, vfloat other) {
  return bit_cast<vfloat>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(one), bit_cast<__m512>(other)));
}

// 2^power for power <= 0, to 4e-6, for what is rounded to 16 bits: 8 instructions, where exp() takes 15. Exactly 1 for
// 0, and 0 where the result is no normal number: vscalefps takes 60 times as long to make one that is not. NaN stays
// NaN.
inline __attribute__((always_inline)) vfloat exp2_of_negative(vfloat power) {
  const vfloat lowest = broadcast(-126.0f);
  const __mmask16 is_normal = _mm512_cmp_ps_mask(bit_cast<__m512>(power), bit_cast<__m512>(lowest), _CMP_NLT_UQ);
  constexpr int down = 1;
  // power - floor(power), in 0..1.
  const auto fraction = bit_cast<vfloat>(_mm512_maskz_reduce_ps(0xffff, bit_cast<__m512>(power), down));
  // 2^fraction. Smallest maximum of the relative error among the polynomials of degree 4 with 1 at 0 and 2 at 1.
  vfloat result = fraction * 0x1.bc31dap-7f + 0x1.aa3fcap-5f;
  result = result * fraction + 0x1.ee5884p-3f;
  result = result * fraction + 0x1.62d51cp-1f;
  result = result * fraction + 1.0f;
  // Times 2^floor(power).
  return bit_cast<vfloat>(_mm512_maskz_scalef_ps(is_normal, bit_cast<__m512>(result), bit_cast<__m512>(power)));
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
