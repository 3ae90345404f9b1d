#include "core/argument_structs.h"
#include "core/library.h"
#include "routed_ffn/cuda/device.h"
#include "routed_ffn/feed_forward.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("routed_ffn", flattened<routed_ffn_on<CudaDevice>>);
  m.impl("_routed_ffn_forward", flattened<routed_ffn_forward_on<CudaDevice>>);
  m.impl("_routed_ffn_backward", flattened<routed_ffn_backward_on<CudaDevice>>);
}

}  // namespace torchops
