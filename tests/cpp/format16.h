#pragma once

#include <cmath>
#include <cstdint>

// What the bits of a 16-bit format mean, by its definition.

struct Format16 {
  int exponent_bits;
  int fraction_bits;

  double meaning(uint16_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) {
      return fraction ? NAN : sign * INFINITY;
    }
    const double significand = std::ldexp(fraction, -fraction_bits) + (exponent ? 1 : 0);
    return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias);
  }
};

inline constexpr Format16 bfloat16_format{8, 7};
inline constexpr Format16 float16_format{5, 10};
