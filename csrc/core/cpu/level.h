#pragma once

#include <array>
#include <string>
#include <vector>

#include "core/export.h"

// Kernels are compiled once per instruction-set level (cmake/CpuLevels.cmake), each time in a
// namespace named after the level. This header declares them at all levels and picks one.
//
// What amx adds to avx512_bf16 are tiles, which serve few kernels. Those have a file of their own for amx,
// <kernel>_tiles.cpp, and are declared for it by name; of all others amx uses what avx512_bf16 has.

#if defined(__x86_64__)
#define TORCHOPS_FOR_EACH_LEVEL_NAME(macro) macro(baseline) macro(avx2) macro(avx512) macro(avx512_bf16) macro(amx)
#define TORCHOPS_FOR_EACH_LEVEL(macro)                                         \
  macro(baseline) macro(avx2) macro(avx512) macro(avx512_bf16) namespace amx { \
    using namespace avx512_bf16;                                               \
  }
#define TORCHOPS_FOR_EACH_LEVEL_AND_TILES(macro) TORCHOPS_FOR_EACH_LEVEL(macro) macro(amx)
#else
#define TORCHOPS_FOR_EACH_LEVEL_NAME(macro) macro(baseline)
#define TORCHOPS_FOR_EACH_LEVEL(macro) macro(baseline)
#define TORCHOPS_FOR_EACH_LEVEL_AND_TILES(macro) macro(baseline)
#endif

namespace torchops {

// The name of the level in use: the best the CPU has, or a lower one that the environment variable
// TORCHOPS_CPU_CAPABILITY asks for. Throws a ValueError if it asks for one that is not there.
TORCHOPS_API const std::string& cpu_capability();

// All levels that this CPU can execute, lowest first.
TORCHOPS_API std::vector<std::string> cpu_capabilities();

// Why the level in use is not the next higher one; empty where there is none.
TORCHOPS_API std::string why_no_higher_level();

namespace kernels {

#define TORCHOPS_COUNT_LEVEL(level) +1
inline constexpr size_t level_count = TORCHOPS_FOR_EACH_LEVEL_NAME(TORCHOPS_COUNT_LEVEL);
#undef TORCHOPS_COUNT_LEVEL

// Position of the level in use, in the order of TORCHOPS_FOR_EACH_LEVEL_NAME.
size_t level_index();

template <typename Kernel>
Kernel select_level(const std::array<Kernel, level_count>& kernel_at_level) {
  return kernel_at_level[level_index()];
}

}  // namespace kernels
}  // namespace torchops

// TORCHOPS_KERNEL(tokens, gather_rows<float>)(args, begin, end) calls the level in use of the kernel
// torchops::kernels::tokens::<level>::gather_rows<float>.
#if defined(__x86_64__)
#define TORCHOPS_KERNEL(family, ...)                                                                             \
  ::torchops::kernels::select_level(std::array{                                                                  \
      &::torchops::kernels::family::baseline::__VA_ARGS__, &::torchops::kernels::family::avx2::__VA_ARGS__,      \
      &::torchops::kernels::family::avx512::__VA_ARGS__, &::torchops::kernels::family::avx512_bf16::__VA_ARGS__, \
      &::torchops::kernels::family::amx::__VA_ARGS__})
#else
#define TORCHOPS_KERNEL(family, ...) \
  ::torchops::kernels::select_level(std::array{&::torchops::kernels::family::baseline::__VA_ARGS__})
#endif
