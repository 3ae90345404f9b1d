#include "core/cpu/features.h"

namespace torchops {

bool cpu_has_level(const std::string& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (level == "avx512") {
    return cpu_has_level("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (level == "avx512_bf16") {
    return cpu_has_level("avx512") && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return level == "baseline";
}

}  // namespace torchops
