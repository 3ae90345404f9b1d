#pragma once

#include <algorithm>

#include "core/attention/cpu/device.h"
#include "sparse_attention/arguments.h"
#include "sparse_attention/cpu/backward_kernel.h"
#include "sparse_attention/cpu/forward_kernel.h"

namespace torchops {

// The CPU, for sparse_attention/attending.h.
class CpuTopkAttention : public CpuAttention {
 public:
  using CpuAttention::CpuAttention;
  explicit CpuTopkAttention(const TopkBackward& args)
      : CpuAttention(args.normalizer.device()), by_tile_(goes_by_tile(args)) {}

  template <typename T>
  void forward(const kernels::sparse_attention::AttentionForward<T>& args) const {
    parallel_tiles(TORCHOPS_KERNEL(sparse_attention, forward_units<T>)(args.inputs), unit_cost(args.inputs),
                   TORCHOPS_KERNEL(sparse_attention, forward_scratch_bytes<T>)(args.inputs),
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, forward<T>)(args, scratch, begin, end);
                   });
  }

  template <typename T>
  void row_delta(const kernels::attention::RowDelta<T>& args) const {
    const auto& sizes = args.sizes;
    parallel_units(sizes.batch * sizes.num_heads * sizes.num_queries, sizes.value_dim, [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(sparse_attention, row_delta<T>)(args, by_tile_, begin, end);
    });
  }

  template <typename T>
  void backward(const kernels::sparse_attention::AttentionBackward<T>& args, const TopkMask& mask) const {
    const auto& inputs = args.inputs;
    const auto& sizes = inputs.sizes;
    const bool for_queries = mask.query() || mask.pair_bias();
    const bool for_keys = mask.key() || mask.value() || mask.key_bias();
    const auto units = TORCHOPS_KERNEL(sparse_attention, backward_query_units<T>)(inputs);
    const auto scratch_bytes = [&](int64_t num_keys) {
      return TORCHOPS_KERNEL(sparse_attention, backward_scratch_bytes<T>)(args, num_keys);
    };
    // A pass over whole heads computes the probabilities once instead of twice; heads that do not fill the threads are
    // cut into tiles of queries and ranges of keys.
    const int64_t heads = sizes.batch * sizes.num_kv_heads, threads = at::get_num_threads();
    const int64_t whole = for_queries && for_keys ? heads / threads * threads : 0;
    parallel_tiles(whole, 4 * units * unit_cost(inputs), whole > 0 ? scratch_bytes(sizes.num_keys) : 0,
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, backward_heads<T>)(args, scratch, begin, end);
                   });
    const int64_t rest = heads - whole;
    parallel_tiles(for_queries ? rest * units : 0, 2 * unit_cost(inputs), scratch_bytes(0),
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, backward_queries<T>)(args, whole, scratch, begin, end);
                   });
    // Every range looks at every list: no more of them than fill the threads.
    const int64_t ranges = rest == 0 ? 1 : std::max<int64_t>((threads + rest - 1) / rest, 1);
    const int64_t keys_at_a_time = std::max<int64_t>((sizes.num_keys + ranges - 1) / ranges, 1);
    parallel_tiles(for_keys ? rest * ((sizes.num_keys + keys_at_a_time - 1) / keys_at_a_time) : 0,
                   2 * units * unit_cost(inputs), scratch_bytes(keys_at_a_time),
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, backward_keys<T>)
                     (args, whole, keys_at_a_time, scratch, begin, end);
                   });
  }

 private:
  // At most what the queries of a unit cost: several multiplications of a product are one operation.
  template <typename T>
  static int64_t unit_cost(const kernels::sparse_attention::Attention<T>& inputs) {
    constexpr int64_t at_once = 4;
    const int64_t listed = std::min(inputs.lists.num_listed, inputs.sizes.num_keys) *
                           std::min(inputs.rule.block_size, inputs.sizes.num_keys);
    const int64_t of_choice = inputs.lists.choice == nullptr ? 0 : inputs.sizes.num_keys;
    return std::max<int64_t>(inputs.rule.query_block, 64) *
           (std::min(listed, inputs.sizes.num_keys) * (inputs.sizes.head_dim + inputs.sizes.value_dim) / at_once +
            of_choice);
  }

  // Where no probability is asked for, either way will do.
  static bool goes_by_tile(const TopkBackward& args) {
    if (!args.query || !args.key || !args.indices) {
      return false;
    }
    const int64_t bias_heads = args.options.pair_bias ? args.options.pair_bias->size(1) : 1;
    return kernels::sparse_attention::by_tile(
        rule_of(args.options, args.query->size(2)).query_block,
        kernels::sparse_attention::heads_of_list(args.query->size(1), args.key->size(1), args.indices->size(1),
                                                 bias_heads));
  }

  bool by_tile_ = false;
};

}  // namespace torchops
