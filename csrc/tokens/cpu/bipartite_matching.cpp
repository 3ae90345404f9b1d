#include "tokens/cpu/bipartite_matching.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "core/cpu/aligned_buffer.h"
#include "core/parallel.h"
#include "core/tensors.h"
#include "tokens/bipartite_matching.h"
#include "tokens/cpu/assignment.h"
#include "tokens/cpu/best_destination_kernel.h"

namespace torchops {

MatchedPairs matched_pairs(const char* op, const at::Tensor& metric, int64_t r, int64_t num_protected,
                           const std::optional<at::Tensor>& padding_mask) {
  check_bipartite_matching(op, metric, r, num_protected, padding_mask);
  const auto batch = metric.size(0), num_tokens = metric.size(1), num_features = metric.size(2);
  const auto mask = checked_padding_mask(op, padding_mask, num_protected);
  const bool* padding = data_or_null<bool>(mask);
  const auto features = with_contiguous_rows(metric);
  const int64_t removed = clamped_r(num_tokens, r, num_protected).expect_int();
  const auto int64_options = metric.options().dtype(at::kLong);
  const MatchedPairs pairs{at::empty({batch, removed}, int64_options), at::empty({batch, removed}, int64_options)};
  if (pairs.sources.numel() == 0) {
    return pairs;
  }

  const int64_t first_source = kernels::tokens::first_source(num_protected);
  const int64_t num_sources = kernels::tokens::num_sources(num_tokens, num_protected);
  std::vector<int32_t> similarity(static_cast<size_t>(batch * num_sources));
  std::vector<int64_t> destination(similarity.size());
  for_dtype(metric.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::BestDestination<T> args{rows<T>(features),  padding,    similarity.data(),
                                                   destination.data(), num_tokens, num_features,
                                                   num_protected,      num_sources};
    const int64_t products = kernels::tokens::source_block * num_tokens / 2 * num_features;
    parallel_units(batch * args.blocks_per_row(), products / 32, [&](int64_t begin, int64_t end) {
      const auto columns = static_cast<size_t>(kernels::tokens::best_destination_columns(num_tokens));
      const auto pairs_per_row = static_cast<size_t>(kernels::tokens::integer_pairs(num_features));
      AlignedBuffer<int16_t> integers(2 * columns * pairs_per_row);
      AlignedBuffer<float> inverse_lengths(columns);
      AlignedBuffer<int64_t> positions(static_cast<size_t>(num_tokens));
      TORCHOPS_KERNEL(tokens, best_destination<T>)
      (args, begin, end, integers.data(), inverse_lengths.data(), positions.data());
    });
  });

  auto* all_sources = pairs.sources.mutable_data_ptr<int64_t>();
  auto* all_destinations = pairs.destinations.mutable_data_ptr<int64_t>();
  parallel_units(batch, 8 * num_tokens, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> candidates;
    for (int64_t b = begin; b < end; ++b) {
      const auto* similarities = similarity.data() + b * num_sources;
      const auto* best = destination.data() + b * num_sources;
      candidates.clear();
      for (int64_t s = 0; s < num_sources; ++s) {
        if (best[s] >= 0) {
          candidates.push_back(s);
        }
      }
      const auto merges = std::min<int64_t>(removed, static_cast<int64_t>(candidates.size()));
      std::partial_sort(
          candidates.begin(), candidates.begin() + merges, candidates.end(), [&](int64_t one, int64_t other) {
            return similarities[one] != similarities[other] ? similarities[one] > similarities[other] : one < other;
          });
      auto* sources = all_sources + b * removed;
      auto* destinations = all_destinations + b * removed;
      for (int64_t rank = 0; rank < merges; ++rank) {
        sources[rank] = first_source + 2 * candidates[static_cast<size_t>(rank)];
        destinations[rank] = best[candidates[static_cast<size_t>(rank)]];
      }
      // Fewer merges than removals happen only where there is padding, and then there is enough of it:
      // removals are at most half of the tokens, and at most half are destinations.
      int64_t position = num_tokens;
      for (int64_t rank = merges; rank < removed; ++rank) {
        do {
          --position;
        } while (!padding[b * num_tokens + position]);
        sources[rank] = position;
        destinations[rank] = -1;
      }
    }
  });
  return pairs;
}

}  // namespace torchops
