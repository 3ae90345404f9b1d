#pragma once

#include <bit>
#include <cstdint>

// Conversions as the device's instructions do them: to nearest, every NaN becomes the one below.

namespace torchops::simt {

inline constexpr uint16_t nan_bits = 0x7fff;

inline float bfloat16_value(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline float float16_value(uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

inline uint16_t bfloat16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return value == value ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : nan_bits;
}

inline uint16_t float16_bits(float value) {
  return value == value ? std::bit_cast<uint16_t>(static_cast<_Float16>(value)) : nan_bits;
}

// Ties away from zero; the 13 lowest bits are 0.
inline uint32_t tf32_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return value == value ? (bits + (finite ? 0x1000 : 0)) & 0xffffe000 : 0x7fffe000;
}

}  // namespace torchops::simt
