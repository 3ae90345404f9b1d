#pragma once

#include <cstdlib>
#include <string_view>

namespace torchops::simt::mistakes {

// Whether a mistake that is built into a kernel (build_in_mistakes.py) is the one of this run.
inline bool is_to_be_made(std::string_view mistake) {
  const char* to_be_made = std::getenv("SIMT_MISTAKE");
  return to_be_made != nullptr && to_be_made == mistake;
}

}  // namespace torchops::simt::mistakes
