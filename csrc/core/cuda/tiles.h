#pragma once

#include <cstdint>

namespace torchops::device {

// How many tiles a length is cut into.
inline int64_t tiles_of(int64_t length, int64_t tile) {
  return (length + tile - 1) / tile;
}

}  // namespace torchops::device
