#include "core/library.h"
#include "routed_ffn/cpu/device.h"
#include "routed_ffn/feed_forward.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("routed_ffn", flattened<routed_ffn_on<RoutedFfnOnCpu>>);
  m.impl("_routed_ffn_forward", flattened<routed_ffn_forward_on<RoutedFfnOnCpu>>);
  m.impl("_routed_ffn_backward", flattened<routed_ffn_backward_on<RoutedFfnOnCpu>>);
}

}  // namespace torchops
