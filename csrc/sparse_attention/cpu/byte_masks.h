#pragma once

#include <cstdint>

#include "core/cpu/simd.h"

// Comparisons of 64 bytes at a time, as bits of a word.

namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL {

using vbyte = vec<uint8_t>;

inline vbyte load_bytes(const uint8_t* from) {
  vbyte bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return bytes;
}

// Bit i: whether lane i of a comparison holds.
inline uint64_t bits_of(vec<int8_t> comparison) {
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask(bit_cast<__m512i>(comparison));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_epi8(bit_cast<__m256i>(comparison)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_epi8(bit_cast<__m128i>(comparison)));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < vector_bytes; ++lane) {
    bits |= static_cast<uint64_t>(comparison[lane] & 1) << lane;
  }
  return bits;
#endif
}

// Bit i: compare(bytes i).
template <typename Compare>
uint64_t word_of(const uint8_t* bytes, const Compare& compare) {
  uint64_t word = 0;
  for (int first = 0; first < 64; first += vector_bytes) {
    word |= bits_of(compare(load_bytes(bytes + first))) << first;
  }
  return word;
}

}  // namespace torchops::kernels::sparse_attention::TORCHOPS_LEVEL
