#include "core/cpu/level.h"
#include "core/library.h"

// torch.ops.torchops_cpu: what Python asks the library itself. No operators, which compute on tensors and are held to the
// contract.
TORCHOPS_REGISTRATION(TORCH_LIBRARY_FRAGMENT(torchops_cpu, library), m) {
  m.def("capability() -> str", [] { return torchops::cpu_capability(); });
  m.def("capabilities() -> str[]", &torchops::cpu_capabilities);
  m.def("why_no_higher_level() -> str", &torchops::why_no_higher_level);
}
