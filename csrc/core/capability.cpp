#include "core/cpu/level.h"
#include "core/library.h"

// torch.ops.torchops_cpu: what Python asks the library itself. None of it is an operator, to which the contract would
// apply.
TORCHOPS_REGISTRATION(TORCH_LIBRARY_FRAGMENT(torchops_cpu, library), m) {
  m.def("capability() -> str", [] { return torchops::cpu_capability(); });
  m.def("capabilities() -> str[]", &torchops::cpu_capabilities);
  m.def("why_no_higher_level() -> str", &torchops::why_no_higher_level);
}
