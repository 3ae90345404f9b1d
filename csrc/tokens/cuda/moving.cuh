#pragma once

#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "tokens/cuda/assignment.h"
#include "tokens/cuda/gather_rows.cuh"
#include "tokens/cuda/segment_sum.cuh"
#include "tokens/cuda/weight_gradient.cuh"
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
    for_row_width<T>(args.num_channels, {args.input, packed_rows(args.output, args.num_channels)}, [&](auto width) {
      device::launch(one_for_each(num_groups, threads_for_row(args.num_channels, width)),
                     kernels::tokens::segment_sum<decltype(width)::value, T>, args);
    });
  }

  template <typename T>
  void gather_rows(const kernels::tokens::GatherRows<T>& args, int64_t num_tokens) const {
    for_row_width<T>(args.num_channels, {args.source, args.residual, packed_rows(args.output, args.num_channels)},
                     [&](auto width) {
                       device::launch(one_for_each(num_tokens, threads_for_row(args.num_channels, width)),
                                      kernels::tokens::gather_rows<decltype(width)::value, T>, args);
                     });
  }

  template <typename T>
  void weight_gradient(const kernels::tokens::WeightGradient<T>& args, int64_t num_groups) const {
    device::launch(one_for_each(num_groups, kernels::tokens::weight_gradient_threads),
                   kernels::tokens::weight_gradient<T>, args);
  }

 private:
  // A block for each unit. Errors name the operator, not this file.
  device::LaunchShape one_for_each(int64_t units, unsigned threads) const {
    return {.grid = units, .block = threads, .file = op_};
  }

  const char* op_;
  c10::cuda::CUDAGuard guard_;
};

}  // namespace torchops
