
#include <tuple>

#include "core/library.h"
#include "tokens/cpu/bipartite_matching.h"

namespace torchops {
namespace {

std::tuple<at::Tensor, at::Tensor> bipartite_pairs_cpu(const at::Tensor& metric, int64_t r,
                                                       const std::optional<at::Tensor>& padding_mask,
                                                       int64_t num_protected) {
  const auto pairs = matched_pairs("bipartite_pairs", metric, r, num_protected, padding_mask);
  return {pairs.sources, pairs.destinations};
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("bipartite_pairs", bipartite_pairs_cpu);
}

}  // namespace torchops
