#pragma once

#include <cstring>

#include "core/scalar.h"
#include "format16.h"

// bfloat16 in tests of kernels on tiles, by double.

inline torchops::kernels::bfloat16 rounded(double value) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline double value_of(torchops::kernels::bfloat16 number) {
  return bfloat16_format.meaning(number.bits);
}
