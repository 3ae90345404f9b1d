#pragma once

#include <cstdint>

namespace torchops::device {

// The blocks of a launch, in numbers that do not wrap around before they are checked.
struct Grid {
  int64_t x, y, z;

  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}

  static constexpr int64_t max_x = INT32_MAX;
  static constexpr int64_t max_yz = 65535;

  bool empty() const { return x == 0 || y == 0 || z == 0; }
  bool allowed() const { return 0 <= x && x <= max_x && 0 <= y && y <= max_yz && 0 <= z && z <= max_yz; }
};

}  // namespace torchops::device
