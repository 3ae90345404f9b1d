#include "core/attention/cuda/device.h"
#include "core/library.h"
#include "sparse_attention/attending.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

// A CUDA device, for sparse_attention/attending.h.
class CudaTopkAttention : public CudaAttention {
 public:
  using CudaAttention::CudaAttention;
  explicit CudaTopkAttention(const TopkBackward& args) : CudaAttention(args.normalizer.device()) {}

  template <typename T>
  void forward(const kernels::sparse_attention::AttentionForward<T>& args) const {
    const auto memory = memory_of_lists(args.inputs);
    kernels::sparse_attention::launch_forward(args, sort_lists(args.inputs, memory));
  }

  template <typename T>
  void row_delta(const kernels::attention::RowDelta<T>& args) const {
    kernels::sparse_attention::launch_row_delta(args);
  }

  template <typename T>
  void backward(const kernels::sparse_attention::AttentionBackward<T>& args, const TopkMask& mask) const {
    const auto memory = memory_of_lists(args.inputs);
    const auto sorted = sort_lists(args.inputs, memory);
    if (mask.query() || mask.pair_bias()) {
      kernels::sparse_attention::launch_query_gradient(args, sorted);
    }
    if (mask.key() || mask.value() || mask.key_bias()) {
      kernels::sparse_attention::launch_key_gradient(args, sorted, {});
    }
  }

 private:
  template <typename T>
  at::Tensor memory_of_lists(const kernels::sparse_attention::Attention<T>& inputs) const {
    return at::empty({2, inputs.sizes.batch, kernels::sparse_attention::sorted_heads(inputs), inputs.lists.num_lists,
                      inputs.lists.num_listed},
                     options<int32_t>());
  }

  template <typename T>
  static kernels::sparse_attention::SortedLists sort_lists(const kernels::sparse_attention::Attention<T>& inputs,
                                                           const at::Tensor& memory) {
    auto* const numbers = memory.mutable_data_ptr<int32_t>();
    const auto sorted = kernels::sparse_attention::all_lists(inputs, numbers, numbers + memory.numel() / 2);
    kernels::sparse_attention::launch_sort_lists(inputs, sorted);
    return sorted;
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
