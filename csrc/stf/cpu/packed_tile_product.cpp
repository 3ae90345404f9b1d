#include "stf/cpu/packed_tile_product.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "stf/cpu/dense_code.h"
#include "stf/cpu/packed_tiles.h"
#include "stf/cpu/tiled_product.h"
#include "stf/tensor_factors.h"

namespace torchops {

#if defined(__x86_64__)
namespace {

using kernels::bfloat16;
using kernels::stf::PackedTileProduct;

void multiply(const PackedTileProduct& args, WrongIndex& wrong) {
  const auto units = kernels::stf::amx::packed_tile_units(args);
  const auto scratch_bytes = kernels::stf::amx::packed_tile_scratch_bytes(args);
  const auto cost = args.num_tokens * args.factor.num_rows * args.factor.row_size() / std::max<int64_t>(units, 1);
  parallel_lists(units, cost, scratch_bytes, wrong, [&](char* scratch, int64_t begin, int64_t end) {
    return kernels::stf::amx::packed_tile_product(args, scratch, begin, end) ? -1 : begin;
  });
}

}  // namespace

bool tiles_multiply_packed(at::ScalarType dtype, int64_t num_tokens) {
  static const bool there_are_tiles = cpu_capability() == "amx";
  return there_are_tiles && dtype == at::kBFloat16 && dense_code_pays(dtype, num_tokens);
}

at::Tensor tile_atoms_to_rows(const at::Tensor& packed_values, const at::Tensor& mask, int64_t num_rows,
                              const at::Tensor& atoms, const std::optional<at::Tensor>& bias, WrongIndex& wrong) {
  const auto a = with_contiguous_rows(atoms);
  const auto b = bias ? bias->contiguous() : at::Tensor();
  auto output = at::empty({a.size(1), num_rows}, packed_values.options());
  multiply({packed_factor<bfloat16>(packed_values, mask, num_rows), false,
            static_cast<const bfloat16*>(a.const_data_ptr()), a.stride(0), a.stride(1), data_or_null<bfloat16>(b),
            static_cast<bfloat16*>(output.mutable_data_ptr()), a.size(1)},
           wrong);
  return output;
}

at::Tensor tile_rows_to_atoms(const at::Tensor& packed_values, const at::Tensor& mask, const at::Tensor& rows,
                              WrongIndex& wrong) {
  const auto r = with_contiguous_rows(rows);
  auto output = at::empty({mask.size(1), r.size(0), mask.size(2)}, packed_values.options());
  multiply(
      {packed_factor<bfloat16>(packed_values, mask, r.size(1)), true, static_cast<const bfloat16*>(r.const_data_ptr()),
       0, r.stride(0), nullptr, static_cast<bfloat16*>(output.mutable_data_ptr()), r.size(0)},
      wrong);
  return output;
}
#else
bool tiles_multiply_packed(at::ScalarType /*dtype*/, int64_t /*num_tokens*/) {
  return false;
}
at::Tensor tile_atoms_to_rows(const at::Tensor&, const at::Tensor&, int64_t, const at::Tensor&,
                              const std::optional<at::Tensor>&, WrongIndex&) {
  return {};
}
at::Tensor tile_rows_to_atoms(const at::Tensor&, const at::Tensor&, const at::Tensor&, WrongIndex&) {
  return {};
}
#endif

}  // namespace torchops
