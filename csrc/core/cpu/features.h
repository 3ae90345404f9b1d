#pragma once

#include <string>

namespace torchops {

// Whether this CPU can execute what cmake/CpuLevels.cmake compiles a level to.
bool cpu_has_level(const std::string& level);

}  // namespace torchops
