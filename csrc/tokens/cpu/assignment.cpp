#include "tokens/cpu/assignment.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "core/parallel.h"

namespace torchops {

at::Tensor checked_assignment(const char* op, const at::Tensor& assign, int64_t num_groups) {
  const auto checked = assign.contiguous();
  const auto* const begin = checked.const_data_ptr<int64_t>();
  const auto* const end = begin + checked.numel();
  int64_t lowest = 0, highest = -1;
  for (const auto* value = begin; value != end; ++value) {
    lowest = std::min(lowest, *value);
    highest = std::max(highest, *value);
  }
  if (lowest < -1 || highest >= num_groups) {
    const auto at = std::find_if(begin, end, [&](int64_t value) { return value < -1 || value >= num_groups; }) - begin;
    TORCH_CHECK_VALUE(false, op, ": expected assign values in -1..", num_groups - 1, ", got ", begin[at], " at [",
                      at / checked.size(1), ", ", at % checked.size(1), "]");
  }
  return checked;
}

TokensOfGroups group_members(const at::Tensor& assign, int64_t num_groups) {
  const auto batch = assign.size(0), num_tokens = assign.size(1);
  const TokensOfGroups result{at::empty({batch, num_groups + 1}, assign.options()), at::empty_like(assign)};
  const auto* assigned = assign.const_data_ptr<int64_t>();
  auto* all_offsets = result.offsets.mutable_data_ptr<int64_t>();
  auto* all_members = result.members.mutable_data_ptr<int64_t>();
  parallel_units(batch, 4 * (num_tokens + num_groups), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      // A counting sort: offsets[m + 1] counts group m, then points to its next free place, and at last
      // to its end.
      const int64_t* groups = assigned + b * num_tokens;
      int64_t* offsets = all_offsets + b * (num_groups + 1);
      int64_t* members = all_members + b * num_tokens;
      std::fill(offsets, offsets + num_groups + 1, 0);
      for (int64_t i = 0; i < num_tokens; ++i) {
        if (groups[i] >= 0) {
          ++offsets[groups[i] + 1];
        }
      }
      int64_t next = 0;
      for (int64_t m = 1; m <= num_groups; ++m) {
        const int64_t count = offsets[m];
        offsets[m] = next;
        next += count;
      }
      for (int64_t i = 0; i < num_tokens; ++i) {
        if (groups[i] >= 0) {
          members[offsets[groups[i] + 1]++] = i;
        }
      }
    }
  });
  return result;
}

std::optional<at::Tensor> checked_padding_mask(const char* op, const std::optional<at::Tensor>& padding_mask,
                                               int64_t num_protected) {
  if (!padding_mask) {
    return std::nullopt;
  }
  const auto mask = padding_mask->contiguous();
  const auto* padding = mask.const_data_ptr<bool>();
  for (int64_t b = 0; b < mask.size(0); ++b) {
    for (int64_t i = 0; i < num_protected; ++i) {
      TORCH_CHECK_VALUE(!padding[b * mask.size(1) + i], op, ": expected padding_mask to be False for the first ",
                        num_protected, " tokens, which are protected, got True at [", b, ", ", i, "]");
    }
  }
  return mask;
}

}  // namespace torchops
