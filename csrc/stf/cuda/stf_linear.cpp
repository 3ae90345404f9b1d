#include "stf/linear.h"

#include "core/library.h"
#include "stf/cuda/sparse_product.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("stf_linear", stf_linear_on<CudaSparseProduct>);
  m.impl("_stf_linear_with_atoms", stf_linear_with_atoms_on<CudaSparseProduct>);
  m.impl("_stf_linear_backward", flattened<stf_linear_backward_on<CudaSparseProduct>>);
  m.impl("stf_linear_straight_through", stf_linear_straight_through_on<CudaSparseProduct>);
}

}  // namespace torchops
