#pragma once

#include <cstdint>

// The part of CUDA's language that kernels use, for g++.

#define __global__ inline  // kernels are defined in headers
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

#define SIMT_VECTORS(scalar, name)                                        \
  struct alignas(2 * sizeof(scalar)) name##2 {                            \
    scalar x, y;                                                          \
  };                                                                      \
  struct alignas(16) name##4 {                                            \
    scalar x, y, z, w;                                                    \
  };                                                                      \
  inline name##2 make_##name##2(scalar x, scalar y) {                     \
    return {x, y};                                                        \
  }                                                                       \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { \
    return {x, y, z, w};                                                  \
  }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
#undef SIMT_VECTORS

using cudaStream_t = void*;
