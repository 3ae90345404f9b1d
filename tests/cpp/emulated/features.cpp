#include "core/cpu/features.h"

namespace torchops {

// The emulated levels, and the one that every CPU has.
std::string missing_for_level(const std::string& level) {
  const bool here = level == "baseline" || level == "avx512_bf16" || level == "amx";
  return here ? "" : "not emulated";
}

}  // namespace torchops
