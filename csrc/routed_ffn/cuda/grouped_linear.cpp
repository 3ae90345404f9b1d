#include "routed_ffn/grouped_linear.h"

#include "core/argument_structs.h"
#include "core/library.h"
#include "routed_ffn/cuda/device.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("grouped_linear", grouped_linear_on<CudaDevice>);
  m.impl("_grouped_linear_backward", flattened<grouped_linear_backward_on<CudaDevice>>);
}

}  // namespace torchops
