#pragma once

#include "routed_ffn/entries.h"

// How the host layers start the kernels.

namespace torchops::kernels::routed_ffn {

void launch_route(const Entries& entries);

}  // namespace torchops::kernels::routed_ffn
