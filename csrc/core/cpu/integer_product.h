#pragma once

#include "core/cpu/matrix_product.h"

// Elements of matrix_product.h that are pairs of 16-bit integers, neighbours along the depth: one instruction
// multiplies and adds up both. Sums are exact as long as they fit 32 bits.

namespace torchops::kernels::inline TORCHOPS_LEVEL {

struct int16_pair {
  int16_t first;
  int16_t second;
};

template <>
struct element<int16_pair> {
  using sum = int32_t;
  using vector = vint;
  static constexpr int depth = 2;
};

inline vint multiply_add(int16_pair a, vint b, vint sum) {
  const vint pairs = vint{} + bit_cast<int32_t>(a);
#if defined(__AVX512BW__)
  return sum + bit_cast<vint>(_mm512_madd_epi16(bit_cast<__m512i>(pairs), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum + bit_cast<vint>(_mm256_madd_epi16(bit_cast<__m256i>(pairs), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum + bit_cast<vint>(_mm_madd_epi16(bit_cast<__m128i>(pairs), bit_cast<__m128i>(b)));
#else
  return sum + (pairs << 16 >> 16) * (b << 16 >> 16) + (pairs >> 16) * (b >> 16);
#endif
}

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
