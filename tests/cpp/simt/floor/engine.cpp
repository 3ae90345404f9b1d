#include <torch/library.h>

#include <cstdint>
#include <optional>

#include "engine/scheduler.h"

// torch.ops.torchops_on_host: what Python tests ask of the engine.
TORCH_LIBRARY(torchops_on_host, m) {
  // How many kernels have been launched so far.
  m.def("num_launches", [] { return torchops::simt::num_launches(); });
  // Threads and blocks of the launches to come run in a random order; without a seed, in ascending order.
  m.def("use_order", [](std::optional<int64_t> seed) {
    using torchops::simt::Order;
    torchops::simt::use_schedule({seed ? Order::random : Order::forward, static_cast<uint32_t>(seed.value_or(0))});
  });
}
