#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <tuple>

#include "core/library.h"
#include "tokens/bipartite_matching.h"
#include "tokens/cuda/bipartite_matching.h"
#include "tokens/cuda/launches.h"

namespace torchops {
namespace {

std::tuple<at::Tensor, at::Tensor> bipartite_pairs_cuda(const at::Tensor& metric, int64_t r,
                                                        const std::optional<at::Tensor>& padding_mask,
                                                        int64_t num_protected) {
  check_bipartite_matching("bipartite_pairs", metric, r, num_protected, padding_mask);
  const c10::DeviceGuard guard(metric.device());
  const auto best = best_destinations_cuda(metric, r, num_protected, padding_mask);
  auto sources = at::empty({metric.size(0), best.args.num_removed}, metric.options().dtype(at::kLong));
  auto destinations = at::empty_like(sources);
  if (best.args.num_removed == 0) {
    return {sources, destinations};
  }
  auto unordered = at::empty_like(sources);
  kernels::tokens::launch_pair_matched_tokens(best.args, metric.size(0), unordered.mutable_data_ptr<int64_t>(),
                                              sources.mutable_data_ptr<int64_t>(),
                                              destinations.mutable_data_ptr<int64_t>());
  return {sources, destinations};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("bipartite_pairs", bipartite_pairs_cuda);
}

}  // namespace torchops
