#pragma once

#include "core/cpu/simd.h"

// What AVX-512 has instructions for, which AVX2 has not: lanes that go where the bits of a mask say, 8 at a time.

#if defined(__AVX2__) && !defined(__AVX512F__)
namespace torchops::kernels::stf::TORCHOPS_LEVEL {

// For each mask, which lane goes where.
struct LaneTables {
  alignas(8) int8_t value_of_row[256][8];  // which of the next values a row has; negative where it has none
  alignas(8) int8_t set_bits[256][8];      // the numbers of the mask's bits that are set, then zeros

  constexpr LaneTables() : value_of_row(), set_bits() {
    for (int mask = 0; mask < 256; ++mask) {
      int8_t next = 0;
      for (int8_t row = 0; row < 8; ++row) {
        const bool there = (mask >> row & 1) != 0;
        value_of_row[mask][row] = there ? next : int8_t{-1};
        if (there) {
          set_bits[mask][next++] = row;
        }
      }
    }
  }
};
inline constexpr LaneTables lane_tables;

inline __attribute__((always_inline)) __m128i lanes_of(const int8_t (&table)[8]) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table));
}

// The next values spread over the 8 rows that the mask names, zeros elsewhere.
inline __attribute__((always_inline)) vec<float> spread_8(const float* values, uint32_t mask) {
  const __m256i lane = _mm256_cvtepi8_epi32(lanes_of(lane_tables.value_of_row[mask]));
  const __m256 spread_out = _mm256_permutevar8x32_ps(bit_cast<__m256>(load(values)), lane);
  return bit_cast<vec<float>>(_mm256_blendv_ps(spread_out, _mm256_setzero_ps(), _mm256_castsi256_ps(lane)));
}

// The lanes that the mask names, pushed together; what stands behind them means nothing.
inline __attribute__((always_inline)) vec<float> push_together(vec<float> values, uint32_t mask) {
  const __m256i lane = _mm256_cvtepi8_epi32(lanes_of(lane_tables.set_bits[mask]));
  return bit_cast<vec<float>>(_mm256_permutevar8x32_ps(bit_cast<__m256>(values), lane));
}
// The numbers of those lanes, the first of which is `first`.
inline __attribute__((always_inline)) vhalfwords numbers_of_lanes(uint32_t mask, int64_t first) {
  return bit_cast<vhalfwords>(_mm_cvtepi8_epi16(lanes_of(lane_tables.set_bits[mask]))) + static_cast<uint16_t>(first);
}

}  // namespace torchops::kernels::stf::TORCHOPS_LEVEL
#endif
