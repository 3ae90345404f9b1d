#pragma once

#include <cstdint>

// AVX-512's instructions in plain C++, as far as kernel files name them, for a machine that does not have them. Flags
// define __AVX512F__ and its like without allowing the instructions (CMakeLists.txt of this folder), so the
// compiler's own header is never included.

#define SIMD_FUNCTION static inline __attribute__((always_inline, unused))

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef uint64_t __mmask64;
typedef uint32_t __mmask32;
typedef uint16_t __mmask16;
typedef uint8_t __mmask8;

#define _MM_FROUND_TO_NEAREST_INT 0
#define _CMP_NLT_UQ 0x15

namespace emulated {

template <typename Lane, typename Vector>
struct Lanes {
  static constexpr int count = sizeof(Vector) / sizeof(Lane);
  Lane lane[count];

  Lanes() : lane{} {}
  explicit Lanes(Vector from) { __builtin_memcpy(lane, &from, sizeof(from)); }
  Vector vector() const {
    Vector to;
    __builtin_memcpy(&to, lane, sizeof(to));
    return to;
  }
};

template <typename Lane, typename Vector>
SIMD_FUNCTION Vector expand(unsigned mask, Vector from) {
  const Lanes<Lane, Vector> packed(from);
  Lanes<Lane, Vector> result;
  for (int lane = 0, next = 0; lane < result.count; ++lane) {
    result.lane[lane] = mask >> lane & 1 ? packed.lane[next++] : Lane(0);
  }
  return result.vector();
}

template <typename Lane, typename Vector>
SIMD_FUNCTION Vector compress(unsigned mask, Vector from) {
  const Lanes<Lane, Vector> spread(from);
  Lanes<Lane, Vector> result;
  for (int lane = 0, next = 0; lane < result.count; ++lane) {
    if (mask >> lane & 1) {
      result.lane[next++] = spread.lane[lane];
    }
  }
  return result.vector();
}

template <typename Lane, typename Vector>
SIMD_FUNCTION void mask_store(void* to, unsigned mask, Vector from) {
  const Lanes<Lane, Vector> lanes(from);
  for (int lane = 0; lane < lanes.count; ++lane) {
    if (mask >> lane & 1) {
      __builtin_memcpy(static_cast<char*>(to) + lane * sizeof(Lane), &lanes.lane[lane], sizeof(Lane));
    }
  }
}

SIMD_FUNCTION float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
SIMD_FUNCTION uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// The instructions on bfloat16 take and give denormals as zeros.
SIMD_FUNCTION float flush(float value) {
  const uint32_t bits = to_bits(value);
  return (bits & 0x7f800000) == 0 ? from_bits(bits & 0x80000000) : value;
}
SIMD_FUNCTION float bfloat16_value(uint16_t bits) {
  return flush(from_bits(static_cast<uint32_t>(bits) << 16));
}
SIMD_FUNCTION uint16_t bfloat16_bits(float value) {
  const uint32_t bits = to_bits(flush(value));
  if (value != value) {
    return static_cast<uint16_t>(bits >> 16 | 0x40);
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulated

SIMD_FUNCTION __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  emulated::Lanes<float, __m512> result(sum);
  const emulated::Lanes<uint16_t, __m512bh> left(a), right(b);
  for (int lane = 0; lane < result.count; ++lane) {
    for (int half = 1; half >= 0; --half) {
      const int at = 2 * lane + half;
      const float product = emulated::bfloat16_value(left.lane[at]) * emulated::bfloat16_value(right.lane[at]);
      result.lane[lane] = emulated::flush(emulated::flush(result.lane[lane]) + product);
    }
  }
  return result.vector();
}

SIMD_FUNCTION __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const emulated::Lanes<float, __m512> first(low), second(high);
  emulated::Lanes<uint16_t, __m512bh> result;
  for (int lane = 0; lane < first.count; ++lane) {
    result.lane[lane] = emulated::bfloat16_bits(first.lane[lane]);
    result.lane[first.count + lane] = emulated::bfloat16_bits(second.lane[lane]);
  }
  return result.vector();
}

SIMD_FUNCTION __m512i _mm512_maskz_cvtepu16_epi32(__mmask16 mask, __m256i from) {
  const emulated::Lanes<uint16_t, __m256i> words(from);
  emulated::Lanes<uint32_t, __m512i> result;
  for (int lane = 0; lane < result.count; ++lane) {
    result.lane[lane] = mask >> lane & 1 ? words.lane[lane] : 0;
  }
  return result.vector();
}
SIMD_FUNCTION __m512 _mm512_maskz_cvtph_ps(__mmask16 mask, __m256i from) {
  const emulated::Lanes<_Float16, __m256i> halves(from);
  emulated::Lanes<float, __m512> result;
  for (int lane = 0; lane < result.count; ++lane) {
    result.lane[lane] = mask >> lane & 1 ? static_cast<float>(halves.lane[lane]) : 0.0f;
  }
  return result.vector();
}
SIMD_FUNCTION __m256i _mm512_maskz_cvtps_ph(__mmask16 mask, __m512 from, int /*rounding*/) {
  const emulated::Lanes<float, __m512> singles(from);
  emulated::Lanes<_Float16, __m256i> result;
  for (int lane = 0; lane < result.count; ++lane) {
    result.lane[lane] = mask >> lane & 1 ? static_cast<_Float16>(singles.lane[lane]) : static_cast<_Float16>(0.0f);
  }
  return result.vector();
}

SIMD_FUNCTION __m512 _mm512_maskz_expand_ps(__mmask16 mask, __m512 from) {
  return emulated::expand<float>(mask, from);
}
SIMD_FUNCTION __m512d _mm512_maskz_expand_pd(__mmask8 mask, __m512d from) {
  return emulated::expand<double>(mask, from);
}
// Numbers that no bit of the mask takes are not read.
SIMD_FUNCTION __m512i _mm512_maskz_expandloadu_epi16(__mmask32 mask, const void* from) {
  emulated::Lanes<uint16_t, __m512i> result;
  for (int lane = 0, next = 0; lane < result.count; ++lane) {
    if (mask >> lane & 1) {
      __builtin_memcpy(&result.lane[lane], static_cast<const char*>(from) + 2 * next++, 2);
    }
  }
  return result.vector();
}
SIMD_FUNCTION __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 from) {
  return emulated::compress<float>(mask, from);
}
SIMD_FUNCTION __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i from) {
  return emulated::compress<int32_t>(mask, from);
}
SIMD_FUNCTION void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 from) {
  emulated::mask_store<float>(to, mask, from);
}
SIMD_FUNCTION void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i from) {
  emulated::mask_store<uint16_t>(to, mask, from);
}

// The second where one is NaN.
SIMD_FUNCTION __m512 _mm512_maskz_max_ps(__mmask16 mask, __m512 a, __m512 b) {
  const emulated::Lanes<float, __m512> left(a), right(b);
  emulated::Lanes<float, __m512> result;
  for (int lane = 0; lane < result.count; ++lane) {
    const float larger = left.lane[lane] > right.lane[lane] ? left.lane[lane] : right.lane[lane];
    result.lane[lane] = mask >> lane & 1 ? larger : 0.0f;
  }
  return result.vector();
}
SIMD_FUNCTION __m512 _mm512_maskz_min_ps(__mmask16 mask, __m512 a, __m512 b) {
  const emulated::Lanes<float, __m512> left(a), right(b);
  emulated::Lanes<float, __m512> result;
  for (int lane = 0; lane < result.count; ++lane) {
    const float smaller = left.lane[lane] < right.lane[lane] ? left.lane[lane] : right.lane[lane];
    result.lane[lane] = mask >> lane & 1 ? smaller : 0.0f;
  }
  return result.vector();
}
// Where a is not less than b, or one of the two is NaN.
SIMD_FUNCTION __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int /*not_less*/) {
  const emulated::Lanes<float, __m512> left(a), right(b);
  unsigned mask = 0;
  for (int lane = 0; lane < left.count; ++lane) {
    mask |= static_cast<unsigned>(!(left.lane[lane] < right.lane[lane])) << lane;
  }
  return static_cast<__mmask16>(mask);
}
// What is left of a number when the next lower integer is taken away; 0 of an infinite one.
SIMD_FUNCTION __m512 _mm512_maskz_reduce_ps(__mmask16 mask, __m512 from, int /*down*/) {
  const emulated::Lanes<float, __m512> lanes(from);
  emulated::Lanes<float, __m512> result;
  for (int lane = 0; lane < result.count; ++lane) {
    const float number = lanes.lane[lane];
    const float rest = __builtin_isinf(number) ? 0.0f : number - __builtin_floorf(number);
    result.lane[lane] = mask >> lane & 1 ? rest : 0.0f;
  }
  return result.vector();
}
// a * 2^floor(b), rounded once, for b within the range of a double's exponents.
SIMD_FUNCTION __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  const emulated::Lanes<float, __m512> numbers(a), powers(b);
  emulated::Lanes<float, __m512> result;
  for (int lane = 0; lane < result.count; ++lane) {
    const float power = powers.lane[lane];
    if ((mask >> lane & 1) == 0) {
      result.lane[lane] = 0;
      continue;
    }
    if (power != power) {
      result.lane[lane] = power;
      continue;
    }
    const uint64_t bits = static_cast<uint64_t>(1023 + static_cast<int64_t>(__builtin_floorf(power))) << 52;
    double factor;
    __builtin_memcpy(&factor, &bits, sizeof(factor));
    result.lane[lane] = static_cast<float>(numbers.lane[lane] * factor);
  }
  return result.vector();
}

// The low halves of the lanes that the mask names.
SIMD_FUNCTION __m256i _mm512_maskz_cvtepi32_epi16(__mmask16 mask, __m512i from) {
  const emulated::Lanes<uint32_t, __m512i> wide(from);
  emulated::Lanes<uint16_t, __m256i> result;
  for (int lane = 0; lane < wide.count; ++lane) {
    result.lane[lane] = mask >> lane & 1 ? static_cast<uint16_t>(wide.lane[lane]) : 0;
  }
  return result.vector();
}

SIMD_FUNCTION __m256i _mm256_slli_epi16(__m256i from, int count) {
  emulated::Lanes<uint16_t, __m256i> lanes(from);
  for (auto& lane : lanes.lane) {
    lane = static_cast<uint16_t>(lane << count);
  }
  return lanes.vector();
}
SIMD_FUNCTION __mmask16 _mm256_movepi16_mask(__m256i from) {
  const emulated::Lanes<uint16_t, __m256i> lanes(from);
  unsigned mask = 0;
  for (int lane = 0; lane < lanes.count; ++lane) {
    mask |= static_cast<unsigned>(lanes.lane[lane] >> 15) << lane;
  }
  return static_cast<__mmask16>(mask);
}

SIMD_FUNCTION __mmask64 _mm512_movepi8_mask(__m512i from) {
  const emulated::Lanes<uint8_t, __m512i> lanes(from);
  __mmask64 mask = 0;
  for (int lane = 0; lane < lanes.count; ++lane) {
    mask |= static_cast<__mmask64>(lanes.lane[lane] >> 7) << lane;
  }
  return mask;
}

// Products of 16-bit integers, those of neighbours added up.
SIMD_FUNCTION __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const emulated::Lanes<int16_t, __m512i> left(a), right(b);
  emulated::Lanes<int32_t, __m512i> result;
  for (int lane = 0; lane < result.count; ++lane) {
    const int first = left.lane[2 * lane] * right.lane[2 * lane];
    const int second = left.lane[2 * lane + 1] * right.lane[2 * lane + 1];
    result.lane[lane] = static_cast<int32_t>(static_cast<uint32_t>(first) + static_cast<uint32_t>(second));
  }
  return result.vector();
}
