#include "core/cpu/level.h"

#include "core/cpu/features.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <sstream>

namespace torchops {
namespace {

#define TORCHOPS_LEVEL_NAME(level) #level,
constexpr std::array level_names{TORCHOPS_FOR_EACH_LEVEL_NAME(TORCHOPS_LEVEL_NAME)};
#undef TORCHOPS_LEVEL_NAME

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
  for (const char* const level : level_names) {
    if (missing_for_level(level).empty()) {
      available.emplace_back(level);
    }
  }
  return available;
}

const std::string& cpu_capability() {
  static const std::string level = choose_level();
  return level;
}

std::string why_no_higher_level() {
  const auto higher = kernels::level_index() + 1;
  if (higher == level_names.size()) {
    return {};
  }
  const auto missing = missing_for_level(level_names[higher]);
  return std::string(level_names[higher]) + ": " +
         (missing.empty() ? "TORCHOPS_CPU_CAPABILITY asks for a lower level" : missing);
}

size_t kernels::level_index() {
  static const auto index =
      static_cast<size_t>(std::find(level_names.begin(), level_names.end(), cpu_capability()) - level_names.begin());
  return index;
}

}  // namespace torchops
