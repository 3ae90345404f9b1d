#pragma once

#include <cstdint>

// Storage types of the kernels, which include no torch header: the bits of a number, and the type it
// is computed in. Conversions are in simd.h.

namespace torchops::kernels {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename accumulate<T>::type;

}  // namespace torchops::kernels
