#include "core/library.h"
#include "stf/factorization.h"

// All are composed of torch's operators.

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_factorize", factorize_weight);
  m.impl("stf_project", project_weight);
  m.impl("_stf_project_to_factors", project_weight_to_factors);
}

}  // namespace torchops
