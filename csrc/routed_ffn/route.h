#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>

#include "routed_ffn/entries.h"

// What every device's route has alike.

namespace torchops {

void check_route(const at::Tensor& index, const c10::SymInt& num_blocks);

inline std::tuple<at::Tensor, at::Tensor> empty_route(const at::Tensor& index, const c10::SymInt& num_blocks) {
  const auto options = index.options().dtype(at::kInt);
  return {at::empty_symint({index.sym_numel()}, options), at::empty_symint({num_blocks + 1}, options)};
}

// Checks, allocates, and calls sort(entries).
template <typename Sort>
std::tuple<at::Tensor, at::Tensor> route_by(const at::Tensor& index, int64_t num_blocks, const Sort& sort) {
  check_route(index, num_blocks);
  const auto entries = index.contiguous();
  const auto [order, offsets] = empty_route(index, num_blocks);
  const bool is_wide = index.scalar_type() == at::kLong;
  kernels::routed_ffn::Entries args{is_wide ? nullptr : entries.const_data_ptr<int32_t>(),
                                    is_wide ? entries.const_data_ptr<int64_t>() : nullptr,
                                    index.numel(),
                                    num_blocks,
                                    nullptr,
                                    order.mutable_data_ptr<int32_t>(),
                                    offsets.mutable_data_ptr<int32_t>()};
  const auto counts = at::empty({args.num_pieces(), num_blocks + 1}, order.options());
  args.counts = counts.mutable_data_ptr<int32_t>();
  sort(args);
  return {order, offsets};
}

}  // namespace torchops
