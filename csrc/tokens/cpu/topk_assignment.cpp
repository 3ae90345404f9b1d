#include "tokens/topk_assignment.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/library.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "tokens/cpu/assignment.h"

namespace torchops {
namespace {

at::Tensor topk_assignment_cpu(const at::Tensor& scores, int64_t k, const std::optional<at::Tensor>& padding_mask,
                               int64_t num_protected, bool fuse) {
  check_topk_assignment(scores, k, num_protected, padding_mask);
  const auto batch = scores.size(0), num_tokens = scores.size(1);
  const auto mask = checked_padding_mask("topk_assignment", padding_mask, num_protected);
  const bool* padding = data_or_null<bool>(mask);
  const int64_t kept = std::min(k, num_tokens - num_protected);
  const int64_t fused_group = num_protected + kept;
  // Every floating dtype is exact in float64.
  const auto wide = scores.to(at::kDouble).contiguous();
  const auto* all_values = wide.const_data_ptr<double>();
  auto assign = at::empty({batch, num_tokens}, scores.options().dtype(at::kLong));
  auto* assigned = assign.mutable_data_ptr<int64_t>();

  parallel_units(batch, 8 * num_tokens, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order(static_cast<size_t>(num_tokens - num_protected));
    for (int64_t b = begin; b < end; ++b) {
      const auto* values = all_values + b * num_tokens;
      auto* groups = assigned + b * num_tokens;
      const auto is_padding = [&](int64_t i) { return padding != nullptr && padding[b * num_tokens + i]; };
      // Real tokens by score, then those whose score is NaN, then padding.
      const auto tier = [&](int64_t i) { return is_padding(i) ? 2 : std::isnan(values[i]) ? 1 : 0; };
      const auto better = [&](int64_t one, int64_t other) {
        if (tier(one) != tier(other)) {
          return tier(one) < tier(other);
        }
        return tier(one) == 0 && values[one] != values[other] ? values[one] > values[other] : one < other;
      };
      std::iota(order.begin(), order.end(), num_protected);
      std::nth_element(order.begin(), order.begin() + kept, order.end(), better);

      std::sort(order.begin(), order.begin() + kept);
      for (int64_t i = num_protected; i < num_tokens; ++i) {
        groups[i] = fuse && !is_padding(i) ? fused_group : -1;
      }
      std::iota(groups, groups + num_protected, 0);
      for (int64_t rank = 0; rank < kept; ++rank) {
        groups[order[static_cast<size_t>(rank)]] = num_protected + rank;
      }
    }
  });
  return assign;
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("topk_assignment", topk_assignment_cpu);
}

}  // namespace torchops
