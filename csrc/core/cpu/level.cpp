#include "core/cpu/level.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace torchops {
namespace {

// The features that cmake/CpuLevels.cmake compiles each level with.
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

std::string choose_level() {
  const auto available = cpu_capabilities();
  const char* wanted = std::getenv("TORCHOPS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return available.back();
  }
  std::ostringstream names;
  for (const auto& name : available) {
    names << (name == available.front() ? "" : ", ") << name;
  }
  TORCH_CHECK_VALUE(std::find(available.begin(), available.end(), wanted) != available.end(),
                    "expected TORCHOPS_CPU_CAPABILITY to be one of the levels this CPU has (", names.str(), "), got ",
                    wanted);
  return wanted;
}

}  // namespace

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> available;
#define TORCHOPS_ADD_LEVEL(level) \
  if (cpu_has_level(#level)) available.emplace_back(#level);
  TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_ADD_LEVEL)
#undef TORCHOPS_ADD_LEVEL
  return available;
}

const std::string& cpu_capability() {
  static const std::string level = choose_level();
  return level;
}

size_t kernels::level_index() {
  static const size_t index = [] {
    const auto available = cpu_capabilities();
    return static_cast<size_t>(std::find(available.begin(), available.end(), cpu_capability()) - available.begin());
  }();
  return index;
}

}  // namespace torchops
