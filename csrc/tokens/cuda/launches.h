#pragma once

#include <cstdint>

#include "tokens/best_destination.h"
#include "tokens/gather_rows.h"
#include "tokens/matched_tokens.h"
#include "tokens/segment_sum.h"
#include "tokens/weight_gradient.h"

// What the host layers have to know of the kernels, and how they start them.

namespace torchops::kernels::tokens {

inline constexpr int group_members_warps = 8;

// The tokens of each group by a stable counting sort.
struct GroupMembers {
  const int64_t* assign;  // [B, N], in -1..M-1
  int64_t* offsets;       // [B, M + 1]: group m's members are members[offsets[m]..offsets[m+1]-1]
  int64_t* members;       // [B, N]: tokens sorted by group, ascending in each
  int32_t* counts;        // [B, group_members_warps, M], scratch
  int64_t num_tokens;     // N
  int64_t num_groups;     // M
};

void launch_group_members(const GroupMembers& args, int64_t batch);

template <typename T>
struct TopkAssignment {
  const T* scores;      // [B, N]
  const bool* padding;  // [B, N], or null for none
  int64_t* assign;      // [B, N]
  int64_t num_tokens;   // N
  int64_t num_protected;
  int64_t num_kept;  // k, at most num_tokens - num_protected
  bool fuse;
};

template <typename T>
void launch_topk_assignment(const TopkAssignment<T>& args, int64_t batch);

template <typename T>
void launch_best_destination(const BestDestination<T>& args, int64_t batch);

void launch_assign_matched_tokens(const MatchedTokens& args, int64_t batch, int64_t* assign /* [B, N] */);

// `unordered` [B, R] is scratch.
void launch_pair_matched_tokens(const MatchedTokens& args, int64_t batch, int64_t* unordered, int64_t* sources,
                                int64_t* destinations);

// What moves tokens is used by several operators: `op` is the one that errors name.
template <typename T>
void launch_segment_sum(const SegmentSum<T>& args, int64_t num_groups, const char* op);

template <typename T>
void launch_gather_rows(const GatherRows<T>& args, int64_t num_tokens, const char* op);

template <typename T>
void launch_weight_gradient(const WeightGradient<T>& args, int64_t num_groups, const char* op);

}  // namespace torchops::kernels::tokens
