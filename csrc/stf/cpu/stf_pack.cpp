#include <ATen/ops/all.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include "core/library.h"
#include "stf/linear.h"
#include "stf/packed_factor.h"

namespace torchops {
namespace {

using kernels::stf::rows_per_group;

// The first index of a row and block that does not fit, as an error.
void check_increasing(const at::Tensor& indices /* int64 */, int64_t basis_size) {
  const auto wrong_at = [&](const at::Tensor& right) {
    return at::all(right).item<bool>() ? at::Tensor() : right.logical_not().nonzero()[0].cpu().contiguous();
  };
  const auto position = [](const at::Tensor& at, int64_t offset) {
    const auto* const p = at.const_data_ptr<int64_t>();
    return c10::str("[", p[0], ", ", p[1], ", ", p[2] + offset, "]");
  };
  if (const auto at = wrong_at(indices.ge(0).logical_and(indices.lt(basis_size))); at.defined()) {
    TORCH_CHECK_VALUE(false, "stf_pack: expected indices in 0..", basis_size - 1, ", got ",
                      indices[at[0].item<int64_t>()][at[1].item<int64_t>()][at[2].item<int64_t>()].item<int64_t>(),
                      " at ", position(at, 0));
  }
  const auto nnz = indices.size(2);
  if (nnz < 2) {
    return;
  }
  if (const auto at = wrong_at(indices.narrow(2, 1, nnz - 1).gt(indices.narrow(2, 0, nnz - 1))); at.defined()) {
    TORCH_CHECK_VALUE(false, "stf_pack: expected indices to increase in every row and block, got one at ",
                      position(at, 1), " that is not larger than the one before");
  }
}

// Made once for a layer, and so composed of torch's operators.
std::tuple<at::Tensor, at::Tensor> stf_pack_cpu(const at::Tensor& values, const at::Tensor& indices,
                                                int64_t basis_size) {
  check_stf_pack(values, indices, basis_size);
  const auto num_rows = values.size(0), num_blocks = values.size(1), nnz = values.size(2);
  const auto groups = (num_rows + rows_per_group - 1) / rows_per_group;
  // int16 above 256 columns, so that no index is negative.
  const auto columns = indices.to(at::kLong);
  check_increasing(columns, basis_size);
  const auto missing = groups * rows_per_group - num_rows;
  const auto longs = columns.options();
  const auto of_rows = [&](const at::Tensor& tensor, const at::Tensor& filler) {
    return at::cat({tensor, filler.expand({missing, num_blocks, nnz})})
        .view({groups, rows_per_group, num_blocks, nnz})
        .permute({0, 2, 1, 3})
        .reshape({groups, num_blocks, rows_per_group * nnz});
  };
  const auto column = of_rows(columns, at::arange(nnz, longs));
  const auto row = at::arange(rows_per_group, longs).repeat_interleave(nnz).expand_as(column);
  const auto order = column.mul(rows_per_group).add(row).argsort(int64_t{2});
  const auto mask = at::zeros({groups, num_blocks, basis_size}, longs)
                        .scatter_add_(2, column, at::ones_like(column).bitwise_left_shift(row));
  return {of_rows(values, at::zeros({1}, values.options())).gather(2, order), mask.to(at::kShort)};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("stf_pack", stf_pack_cpu);
}

}  // namespace torchops
