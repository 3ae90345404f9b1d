#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/library.h"
#include "core/parallel.h"
#include "tokens/cpu/bipartite_matching.h"

namespace torchops {
namespace {

at::Tensor bipartite_assignment_cpu(const at::Tensor& metric, int64_t r, const std::optional<at::Tensor>& padding_mask,
                                    int64_t num_protected) {
  const auto pairs = matched_pairs("bipartite_assignment", metric, r, num_protected, padding_mask);
  const auto batch = metric.size(0), num_tokens = metric.size(1), removed = pairs.sources.size(1);
  auto assign = at::empty({batch, num_tokens}, pairs.sources.options());
  const auto* all_sources = pairs.sources.const_data_ptr<int64_t>();
  const auto* all_destinations = pairs.destinations.const_data_ptr<int64_t>();
  auto* assigned = assign.mutable_data_ptr<int64_t>();
  parallel_units(batch, num_tokens, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto* sources = all_sources + b * removed;
      const auto* destinations = all_destinations + b * removed;
      auto* groups = assigned + b * num_tokens;
      // Tokens that stay are numbered in sequence order; the others follow their destination.
      std::fill(groups, groups + num_tokens, 0);
      for (int64_t rank = 0; rank < removed; ++rank) {
        groups[sources[rank]] = -1;
      }
      int64_t next = 0;
      for (int64_t i = 0; i < num_tokens; ++i) {
        if (groups[i] == 0) {
          groups[i] = next++;
        }
      }
      for (int64_t rank = 0; rank < removed; ++rank) {
        if (destinations[rank] >= 0) {
          groups[sources[rank]] = groups[destinations[rank]];
        }
      }
    }
  });
  return assign;
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("bipartite_assignment", bipartite_assignment_cpu);
}

}  // namespace torchops
