#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "tokens/bipartite_matching.h"
#include "tokens/cuda/bipartite_matching.h"
#include "tokens/cuda/launches.h"

namespace torchops {
namespace {

// Tokens that stay are numbered in sequence order, the others follow their destination.
at::Tensor bipartite_assignment_cuda(const at::Tensor& metric, int64_t r, const std::optional<at::Tensor>& padding_mask,
                                     int64_t num_protected) {
  check_bipartite_matching("bipartite_assignment", metric, r, num_protected, padding_mask);
  const c10::DeviceGuard guard(metric.device());
  const auto best = best_destinations_cuda(metric, r, num_protected, padding_mask);
  auto assign = at::empty({metric.size(0), metric.size(1)}, metric.options().dtype(at::kLong));
  kernels::tokens::launch_assign_matched_tokens(best.args, metric.size(0), assign.mutable_data_ptr<int64_t>());
  return assign;
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("bipartite_assignment", bipartite_assignment_cuda);
}

}  // namespace torchops
