#include "core/cpu/level.h"

#include "core/cpu/features.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace torchops {
namespace {

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
#define TORCHOPS_LEVEL_NAME(level) #level,
  static constexpr const char* names[] = {TORCHOPS_FOR_EACH_LEVEL(TORCHOPS_LEVEL_NAME)};
#undef TORCHOPS_LEVEL_NAME
  static const auto index = static_cast<size_t>(std::find(names, names + level_count, cpu_capability()) - names);
  return index;
}

}  // namespace torchops
