#include "core/attention/cuda/device.h"
#include "core/library.h"
#include "sparse_attention/attending.h"
#include "sparse_attention/cuda/launches.h"
#include "sparse_attention/cuda/list_memory.h"

namespace torchops {
namespace {

// A CUDA device, for sparse_attention/attending.h.
class CudaTopkAttention : public CudaAttention {
 public:
  using CudaAttention::CudaAttention;
  explicit CudaTopkAttention(const TopkBackward& args) : CudaAttention(args.normalizer.device()) {}

  template <typename T>
  void forward(const kernels::sparse_attention::AttentionForward<T>& args) const {
    const ListMemory memory(args.inputs, options<int32_t>());
    kernels::sparse_attention::launch_forward(args, memory.sort(args.inputs));
  }

  template <typename T>
  void row_delta(const kernels::attention::RowDelta<T>& args) const {
    kernels::sparse_attention::launch_row_delta(args);
  }

  template <typename T>
  void backward(const kernels::sparse_attention::AttentionBackward<T>& args, const TopkMask& mask) const {
    const ListMemory memory(args.inputs, options<int32_t>());
    const auto sorted = memory.sort(args.inputs);
    if (mask.query() || mask.pair_bias()) {
      kernels::sparse_attention::launch_query_gradient(args, sorted);
    }
    if (mask.key() || mask.value() || mask.key_bias()) {
      kernels::sparse_attention::launch_key_gradient(args, sorted, {});
    }
  }
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("topk_attention", flattened<topk_attention_on<CudaTopkAttention>>);
  m.impl("topk_attention_lse", flattened<topk_attention_lse_on<CudaTopkAttention>>);
  m.impl("_topk_attention_forward", flattened<topk_attention_forward_on<CudaTopkAttention>>);
  m.impl("_topk_attention_backward", flattened<topk_attention_backward_on<CudaTopkAttention>>);
}

}  // namespace torchops
