#include "sparse_attention/topk_scores.h"

#include "core/attention/cuda/device.h"
#include "core/library.h"
#include "sparse_attention/cuda/launches.h"
#include "sparse_attention/cuda/list_memory.h"

namespace torchops {
namespace {

// A CUDA device, for sparse_attention/topk_scores.h.
class CudaTopkScores : public CudaAttention {
 public:
  using CudaAttention::CudaAttention;

  template <typename T>
  void scores(const kernels::sparse_attention::Scores<T>& args) const {
    kernels::sparse_attention::launch_scores(args);
  }

  template <typename T>
  void gradients(const kernels::sparse_attention::ScoreGradients<T>& args) const {
    if (args.grad_query.data != nullptr) {
      kernels::sparse_attention::launch_score_query_gradient(args);
    }
    if (args.grad_key.data != nullptr) {
      const ListMemory memory(args.inputs, options<int32_t>());
      kernels::sparse_attention::launch_score_key_gradient(args, memory.sort(args.inputs));
    }
  }
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("topk_scores", flattened<topk_scores_on<CudaTopkScores>>);
  m.impl("_topk_scores_backward", flattened<topk_scores_backward_on<CudaTopkScores>>);
}

}  // namespace torchops
