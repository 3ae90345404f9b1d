#include "stf/linear.h"

#include "core/library.h"
#include "stf/cpu/sparse_product.h"

namespace torchops {

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("stf_linear", stf_linear_on<CpuSparseProduct>);
  m.impl("_stf_linear_with_atoms", stf_linear_with_atoms_on<CpuSparseProduct>);
  m.impl("_stf_linear_backward", flattened<stf_linear_backward_on<CpuSparseProduct>>);
  m.impl("stf_linear_straight_through", stf_linear_straight_through_on<CpuSparseProduct>);
}

}  // namespace torchops
