#include "tokens/cuda/launches.h"

#include "core/cuda/dtypes.h"
#include "core/cuda/launch.h"
#include "core/cuda/rows.h"
#include "core/cuda/tiles.h"
#include "tokens/cuda/assign_matched_tokens.cuh"
#include "tokens/cuda/best_destination.cuh"
#include "tokens/cuda/gather_rows.cuh"
#include "tokens/cuda/group_members.cuh"
#include "tokens/cuda/pair_matched_tokens.cuh"
#include "tokens/cuda/segment_sum.cuh"
#include "tokens/cuda/topk_assignment.cuh"
#include "tokens/cuda/weight_gradient.cuh"

namespace torchops::kernels::tokens {

void launch_group_members(const GroupMembers& args, int64_t batch) {
  device::launch({batch, group_members_warps * device::warp_size, device::shared_size<int32_t>(device::max_warps)},
                 group_members, args);
}

template <typename T>
void launch_topk_assignment(const TopkAssignment<T>& args, int64_t batch) {
  device::launch({batch, topk_threads, device::BlockMemory::bytes}, topk_assignment<T>, args);
}

template <typename T>
void launch_best_destination(const BestDestination<T>& args, int64_t batch) {
  device::launch({batch * device::tiles_of(args.num_sources, match_tile), match_threads, match_shared_bytes<T>},
                 best_destination<T>, args);
}

void launch_assign_matched_tokens(const MatchedTokens& args, int64_t batch, int64_t* assign) {
  device::launch({batch, matched_tokens_threads, device::BlockMemory::bytes}, assign_matched_tokens, args, assign);
}

void launch_pair_matched_tokens(const MatchedTokens& args, int64_t batch, int64_t* unordered, int64_t* sources,
                                int64_t* destinations) {
  device::launch({batch, matched_tokens_threads, device::BlockMemory::bytes}, pair_matched_tokens, args, unordered,
                 sources, destinations);
}

template <typename T>
void launch_segment_sum(const SegmentSum<T>& args, int64_t num_groups, const char* op) {
  for_row_width<T>(args.num_channels, {args.input, packed_rows(args.output, args.num_channels)}, [&](auto width) {
    device::launch({.grid = num_groups, .block = threads_for_row(args.num_channels, width), .file = op},
                   segment_sum<width(), T>, args);
  });
}

template <typename T>
void launch_gather_rows(const GatherRows<T>& args, int64_t num_tokens, const char* op) {
  for_row_width<T>(
      args.num_channels, {args.source, args.residual, packed_rows(args.output, args.num_channels)}, [&](auto width) {
        device::launch({.grid = num_tokens, .block = threads_for_row(args.num_channels, width), .file = op},
                       gather_rows<width(), T>, args);
      });
}

template <typename T>
void launch_weight_gradient(const WeightGradient<T>& args, int64_t num_groups, const char* op) {
  device::launch({.grid = num_groups, .block = weight_gradient_threads, .file = op}, weight_gradient<T>, args);
}

#define TORCHOPS_INSTANTIATE(T)                                                 \
  template void launch_topk_assignment(const TopkAssignment<T>&, int64_t);      \
  template void launch_best_destination(const BestDestination<T>&, int64_t);    \
  template void launch_segment_sum(const SegmentSum<T>&, int64_t, const char*); \
  template void launch_gather_rows(const GatherRows<T>&, int64_t, const char*); \
  template void launch_weight_gradient(const WeightGradient<T>&, int64_t, const char*);
TORCHOPS_FOR_EACH_DTYPE(TORCHOPS_INSTANTIATE)

}  // namespace torchops::kernels::tokens
