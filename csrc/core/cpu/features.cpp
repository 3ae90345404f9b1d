#include "core/cpu/features.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace torchops {

#if defined(__x86_64__)
namespace {

// Linux keeps the registers of tiles for processes that ask. Permission is the whole process's.
std::string refused_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const int error = syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? 0 : errno;
  return error == 0 ? std::string() : std::string("the operating system grants no tiles: ") + std::strerror(error);
}

}  // namespace

// The builtin takes literals only.
#define TORCHOPS_NEED(feature)            \
  if (!__builtin_cpu_supports(feature)) { \
    return "the CPU has no " feature;     \
  }

std::string missing_for_level(const std::string& level) {
  __builtin_cpu_init();
  if (level == "baseline") {
    return {};
  }
  TORCHOPS_NEED("avx2")
  TORCHOPS_NEED("fma")
  TORCHOPS_NEED("f16c")
  if (level == "avx2") {
    return {};
  }
  TORCHOPS_NEED("avx512f")
  TORCHOPS_NEED("avx512bw")
  TORCHOPS_NEED("avx512vl")
  TORCHOPS_NEED("avx512dq")
  if (level == "avx512") {
    return {};
  }
  TORCHOPS_NEED("avx512bf16")
  if (level == "avx512_bf16") {
    return {};
  }
  TORCHOPS_NEED("avx512vbmi2")
  TORCHOPS_NEED("amx-tile")
  TORCHOPS_NEED("amx-bf16")
  return refused_tiles();
}

#undef TORCHOPS_NEED
#else
std::string missing_for_level(const std::string& /*level*/) {
  return {};
}
#endif

}  // namespace torchops
