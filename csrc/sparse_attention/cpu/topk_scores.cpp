#include "sparse_attention/topk_scores.h"

#include <algorithm>

#include "core/library.h"
#include "core/parallel.h"
#include "sparse_attention/cpu/scores_kernel.h"

namespace torchops {
namespace {

// The CPU, for sparse_attention/topk_scores.h.
class CpuTopkScores {
 public:
  explicit CpuTopkScores(at::Device /*device*/) {}

  template <typename T>
  void scores(const kernels::sparse_attention::Scores<T>& args) const {
    parallel_tiles(units(args.inputs), cost_of_unit(args.inputs), scratch_bytes(args.inputs, 0),
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, scores<T>)(args, scratch, begin, end);
                   });
  }

  template <typename T>
  void gradients(const kernels::sparse_attention::ScoreGradients<T>& args) const {
    const auto& inputs = args.inputs;
    const auto& sizes = inputs.sizes;
    if (args.grad_query.data != nullptr) {
      parallel_tiles(units(inputs), cost_of_unit(inputs), scratch_bytes(inputs, 0),
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(sparse_attention, score_query_gradient<T>)(args, scratch, begin, end);
                     });
    }
    const int64_t kv_heads = sizes.batch * sizes.num_kv_heads;
    if (args.grad_key.data != nullptr && kv_heads > 0) {
      // Every range looks at every list: no more of them than fill the threads.
      const int64_t ranges = (at::get_num_threads() + kv_heads - 1) / kv_heads;
      const int64_t keys_at_a_time = std::max<int64_t>((sizes.num_keys + ranges - 1) / ranges, 1);
      parallel_tiles(kv_heads * ((sizes.num_keys + keys_at_a_time - 1) / keys_at_a_time),
                     units(inputs) * cost_of_unit(inputs), scratch_bytes(inputs, keys_at_a_time),
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(sparse_attention, score_key_gradient<T>)
                       (args, keys_at_a_time, scratch, begin, end);
                     });
    }
  }

 private:
  template <typename T>
  static int64_t units(const kernels::sparse_attention::Attention<T>& inputs) {
    return TORCHOPS_KERNEL(sparse_attention, score_units<T>)(inputs);
  }

  template <typename T>
  static int64_t scratch_bytes(const kernels::sparse_attention::Attention<T>& inputs, int64_t num_keys) {
    return TORCHOPS_KERNEL(sparse_attention, scores_scratch_bytes<T>)(inputs, num_keys);
  }

  // Several multiplications of a product are one operation.
  template <typename T>
  static int64_t cost_of_unit(const kernels::sparse_attention::Attention<T>& inputs) {
    constexpr int64_t at_once = 4, queries = 64;
    return std::max(inputs.rule.query_block, queries) * kernels::sparse_attention::num_columns(inputs) *
           std::max<int64_t>(inputs.sizes.head_dim / at_once, 1);
  }
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CPU, m) {
  m.impl("topk_scores", flattened<topk_scores_on<CpuTopkScores>>);
  m.impl("_topk_scores_backward", flattened<topk_scores_backward_on<CpuTopkScores>>);
}

}  // namespace torchops
