#pragma once

#include <c10/core/DeviceGuard.h>

#include "tokens/cuda/assignment.h"
#include "tokens/cuda/launches.h"
#include "tokens/moving.h"

namespace torchops {

// A CUDA device, for tokens/moving.h. Nobody has looked at the assignment: kernels do not follow a wrong one.
class CudaTokens {
 public:
  CudaTokens(const char* op, at::Device device) : op_(op), guard_(device) {}

  at::Tensor assignment(const at::Tensor& assign, int64_t /*num_groups*/) const { return assign.contiguous(); }

  TokensOfGroups members(const at::Tensor& assignment, int64_t num_groups) const {
    return group_members_cuda(assignment, num_groups);
  }

  template <typename T>
  void segment_sum(const kernels::tokens::SegmentSum<T>& args, int64_t num_groups) const {
    kernels::tokens::launch_segment_sum(args, num_groups, op_);
  }

  template <typename T>
  void gather_rows(const kernels::tokens::GatherRows<T>& args, int64_t num_tokens) const {
    kernels::tokens::launch_gather_rows(args, num_tokens, op_);
  }

  template <typename T>
  void weight_gradient(const kernels::tokens::WeightGradient<T>& args, int64_t num_groups) const {
    kernels::tokens::launch_weight_gradient(args, num_groups, op_);
  }

 private:
  const char* op_;
  c10::DeviceGuard guard_;
};

}  // namespace torchops
