#pragma once

#include <algorithm>

#include "core/parallel.h"
#include "tokens/cpu/assignment.h"
#include "tokens/cpu/gather_rows_kernel.h"
#include "tokens/cpu/segment_sum_kernel.h"
#include "tokens/cpu/weight_gradient_kernel.h"
#include "tokens/moving.h"

namespace torchops {

// The CPU, for tokens/moving.h.
class CpuTokens {
 public:
  CpuTokens(const char* op, at::Device /*device*/) : op_(op) {}

  at::Tensor assignment(const at::Tensor& assign, int64_t num_groups) const {
    return checked_assignment(op_, assign, num_groups);
  }

  TokensOfGroups members(const at::Tensor& assignment, int64_t num_groups) const {
    return group_members(assignment, num_groups);
  }

  template <typename T>
  void segment_sum(const kernels::tokens::SegmentSum<T>& args, int64_t num_groups) const {
    parallel_units(num_groups, args.num_channels,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, segment_sum<T>)(args, begin, end); });
  }

  template <typename T>
  void gather_rows(const kernels::tokens::GatherRows<T>& args, int64_t num_tokens) const {
    parallel_units(num_tokens, args.num_channels,
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, gather_rows<T>)(args, begin, end); });
  }

  template <typename T>
  void weight_gradient(const kernels::tokens::WeightGradient<T>& args, int64_t num_groups) const {
    const int64_t members = args.num_tokens / std::max<int64_t>(1, args.num_groups);
    parallel_units(num_groups, args.num_channels * (1 + members),
                   [&](int64_t begin, int64_t end) { TORCHOPS_KERNEL(tokens, weight_gradient<T>)(args, begin, end); });
  }

 private:
  const char* op_;
};

}  // namespace torchops
