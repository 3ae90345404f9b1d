#include "core/cpu/features.h"

namespace torchops {

// The emulated level, and the one that every CPU has.
bool cpu_has_level(const std::string& level) {
  return level == "baseline" || level == "avx512_bf16";
}

}  // namespace torchops
