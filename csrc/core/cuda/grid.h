#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace torchops::device {

// The blocks of a launch, in numbers that do not wrap around before they are checked.
struct Grid {
  int64_t x, y, z;

  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}

  static constexpr int64_t max_x = INT32_MAX;
  static constexpr int64_t max_yz = 65535;

  bool empty() const { return x == 0 || y == 0 || z == 0; }
  bool allowed() const { return 0 <= x && x <= max_x && 0 <= y && y <= max_yz && 0 <= z && z <= max_yz; }

  // What to say where it is not allowed, of an operator or of a file that launches: csrc/<family>/cuda/<file>.
  std::string error(std::string_view name) const {
    const auto shape = [](int64_t a, int64_t b, int64_t c) {
      return std::string("[") + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + "]";
    };
    if (const auto end = name.rfind("/cuda/"); end != std::string_view::npos) {
      name = name.substr(0, end);
    }
    return std::string(name.substr(name.rfind('/') + 1)) + ": expected a grid of at most " +
           shape(max_x, max_yz, max_yz) + " blocks, got " + shape(x, y, z);
  }
};

}  // namespace torchops::device
