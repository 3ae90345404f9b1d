#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "core/attention/attention.h"
#include "core/attention/cpu/delta_kernel.h"
#include "core/parallel.h"

namespace torchops {

// The CPU, for core/attention/attending.h.
class CpuAttention {
 public:
  explicit CpuAttention(at::Device /*device*/) {}

  static void check(const char* /*op*/, const at::Tensor& /*query*/, const at::Tensor& /*key*/) {}

  template <typename T>
  void row_delta(const kernels::attention::RowDelta<T>& args) const {
    const auto& sizes = args.sizes;
    parallel_units(sizes.batch * sizes.num_heads * sizes.num_queries, sizes.value_dim,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(attention, row_delta<T>)(args, begin, end); });
  }

  template <typename A>
  void sink_gradient(const kernels::attention::SinkGradient<A>& args) const {
    const auto& sizes = args.sizes;
    parallel_units(sizes.num_heads, sizes.batch * sizes.num_queries,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(attention, sink_gradient<A>)(args, begin, end); });
  }

  at::Tensor sum_of_shares(const at::Tensor& shares, const kernels::attention::Sizes& /*sizes*/) const {
    return shares.sum(1);
  }
};

}  // namespace torchops
