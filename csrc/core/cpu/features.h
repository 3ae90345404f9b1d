#pragma once

#include <string>

namespace torchops {

// What this CPU, or its operating system, lacks to execute what cmake/CpuLevels.cmake compiles a level to; empty where
// it lacks nothing.
std::string missing_for_level(const std::string& level);

}  // namespace torchops
