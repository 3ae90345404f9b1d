#include "stf/cpu/packed_product.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <atomic>

#include "core/cpu/aligned_buffer.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "stf/cpu/packed_product_kernel.h"

namespace torchops {
namespace {

using kernels::stf::PackedFactor;
using kernels::stf::rows_per_group;

template <typename T>
PackedFactor<T> packed_factor(const at::Tensor& packed_values, const at::Tensor& mask, int64_t num_rows) {
  return {static_cast<const T*>(packed_values.const_data_ptr()),
          static_cast<const uint16_t*>(mask.const_data_ptr()),
          num_rows,
          mask.size(1),
          packed_values.size(2) / rows_per_group,
          mask.size(2)};
}

// work returns whether the masks it met go with the values.
template <typename Work>
void parallel_groups(int64_t count, int64_t cost, int64_t scratch_bytes, const Work& work) {
  std::atomic<bool> right = true;
  parallel_units(count, cost, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    if (!work(scratch.data(), begin, end)) {
      right = false;
    }
  });
  TORCH_CHECK_VALUE(right,
                    "stf_linear_packed: expected mask to have as many bits in every group and block as "
                    "packed_values has values there, got another number: both come from one stf_pack");
}

}  // namespace

at::Tensor CpuPackedProduct::atoms_to_rows(const at::Tensor& atoms, const std::optional<at::Tensor>& bias) const {
  const auto num_tokens = atoms.size(1);
  const auto v = packed_values.contiguous(), m = mask.contiguous();
  const auto a = atoms.to(at::toOpMathType(v.scalar_type())).contiguous();
  const auto b = bias ? bias->contiguous() : at::Tensor();
  auto output = at::empty({num_tokens, num_rows}, v.options());
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::stf::PackedAtomsToRows<T> args{packed_factor<T>(v, m, num_rows),
                                                  a.const_data_ptr<kernels::accumulate_t<T>>(),
                                                  b.defined() ? static_cast<const T*>(b.const_data_ptr()) : nullptr,
                                                  static_cast<T*>(output.mutable_data_ptr()), num_tokens};
    const auto scratch = TORCHOPS_KERNEL(stf, packed_scratch_bytes<T>)(args.factor);
    parallel_groups(args.factor.num_groups(), rows_per_group * args.factor.num_blocks * args.factor.nnz, scratch,
                    [&](char* memory, int64_t begin, int64_t end) {
                      return TORCHOPS_KERNEL(stf, packed_atoms_to_rows<T>)(args, memory, begin, end);
                    });
  });
  return output;
}

at::Tensor CpuPackedProduct::rows_to_atoms(const at::Tensor& rows) const {
  const auto num_tokens = rows.size(0);
  const auto v = packed_values.contiguous(), m = mask.contiguous();
  const auto wide = rows.to(at::toOpMathType(v.scalar_type()));
  const auto padded = at::constant_pad_nd(wide, {0, m.size(0) * rows_per_group - num_rows}).contiguous();
  at::Tensor sums;
  for_dtype(v.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    kernels::stf::PackedRowsToAtoms<T> args{packed_factor<T>(v, m, num_rows), padded.const_data_ptr<A>(), nullptr,
                                            num_tokens};
    sums = at::empty({args.num_parts(), m.size(1), num_tokens, m.size(2)}, wide.options());
    args.sums = sums.mutable_data_ptr<A>();
    const auto scratch = TORCHOPS_KERNEL(stf, packed_scratch_bytes<T>)(args.factor);
    parallel_groups(args.num_parts(), args.groups_of_part * rows_per_group * args.factor.num_blocks * args.factor.nnz,
                    scratch, [&](char* memory, int64_t begin, int64_t end) {
                      return TORCHOPS_KERNEL(stf, packed_rows_to_atoms<T>)(args, memory, begin, end);
                    });
  });
  return sums.sum(0).to(v.scalar_type());
}

}  // namespace torchops
