#include <ATen/ops/empty.h>

#include "core/autograd.h"
#include "core/checks.h"
#include "core/library.h"
#include "stf/linear.h"
#include "stf/packed_factor.h"
#include "stf/stf.h"

namespace torchops {

using kernels::stf::rows_per_group;

TORCHOPS_LIBRARY(m) {
  m.def("stf_pack(Tensor values, Tensor indices, SymInt basis_size) -> (Tensor packed_values, Tensor mask)");
}

// ---- checks -----------------------------------------------------------------------------------

void check_stf_pack(const at::Tensor& values, const at::Tensor& indices, const c10::SymInt& basis_size) {
  const Checks check("stf_pack");
  check.rank("values", values, "[rows, blocks, nnz]");
  check.floating("values", values);
  check.shape("indices", indices, "[rows, blocks, nnz]", values.sym_sizes());
  check.index_dtype("indices", indices);
  check.same_device("indices", indices, "values", values);
  check.between("basis_size", basis_size, 1, largest_basis_size);
  check.at_most("values' last dimension nnz", values.sym_size(2), "basis_size", basis_size);
}

namespace {

// ---- shapes -----------------------------------------------------------------------------------

c10::SymInt groups_of(const c10::SymInt& num_rows) {
  return (num_rows + (rows_per_group - 1)) / rows_per_group;
}

std::tuple<at::Tensor, at::Tensor> stf_pack_meta(const at::Tensor& values, const at::Tensor& indices,
                                                 c10::SymInt basis_size) {
  check_stf_pack(values, indices, basis_size);
  const auto groups = groups_of(values.sym_size(0)), num_blocks = values.sym_size(1);
  return {at::empty_symint({groups, num_blocks, values.sym_size(2) * rows_per_group}, values.options()),
          at::empty_symint({groups, num_blocks, basis_size}, values.options().dtype(at::kShort))};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(Meta, m) {
  m.impl("stf_pack", stf_pack_meta);
}

TORCHOPS_LIBRARY_IMPL(Autograd, m) {
  m.impl("stf_pack", torch::autograd::autogradNotImplementedFallback());
}

// ---- C++ API ----------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> stf_pack(const at::Tensor& values, const at::Tensor& indices,
                                            c10::SymInt basis_size) {
  static const auto op = find_operator<decltype(stf_pack)>("stf_pack");
  return op(values, indices, basis_size);
}

}  // namespace torchops
