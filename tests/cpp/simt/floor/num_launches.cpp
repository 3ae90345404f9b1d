#include <torch/library.h>

#include "engine/scheduler.h"

// torch.ops.torchops_on_host.num_launches(): how many kernels have been launched so far.
TORCH_LIBRARY(torchops_on_host, m) {
  m.def("num_launches", [] { return torchops::simt::num_launches(); });
}
