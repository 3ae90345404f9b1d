#include "span_attention/span_attention.h"

#include "core/attention/cuda/device.h"
#include "core/library.h"
#include "span_attention/attending.h"
#include "span_attention/cuda/launches.h"
#include "span_attention/cuda/lengths.h"

namespace torchops {
namespace {

// A CUDA device, for span_attention/attending.h.
class CudaSpanAttention : public CudaAttention {
 public:
  using CudaAttention::CudaAttention;

  static void check(const char* op, const at::Tensor& query, const at::Tensor& key) { check_lengths(op, query, key); }

  template <typename T>
  void forward(const kernels::span_attention::AttentionForward<T>& args) const {
    if (!kernels::span_attention::decodes(args)) {
      return kernels::span_attention::launch_forward(args);
    }
    using A = kernels::accumulate_t<T>;
    const auto& sizes = args.inputs.sizes;
    const auto pieces = kernels::span_attention::decode_pieces(sizes, args.inputs.span);
    const int64_t rows = sizes.batch * sizes.num_heads * sizes.num_queries;
    const auto results = at::empty({rows, pieces, sizes.value_dim}, options<A>());
    const auto softmax = at::empty({rows, pieces, 2}, options<A>());
    kernels::span_attention::launch_decode(
        args, {results.template mutable_data_ptr<A>(), softmax.template mutable_data_ptr<A>(), pieces});
  }

  template <typename T>
  void row_delta(const kernels::span_attention::RowDelta<T>& args) const {
    kernels::span_attention::launch_row_delta(args);
  }

  template <typename T>
  void backward(const kernels::span_attention::AttentionBackward<T>& args, const SpanMask& mask) const {
    if (mask.query()) {
      kernels::span_attention::launch_query_gradient(args);
    }
    if (mask.key() || mask.value() || mask.key_bias()) {
      kernels::span_attention::launch_key_gradient(args);
    }
  }
};

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("span_attention", flattened<span_attention_on<CudaSpanAttention>>);
  m.impl("span_attention_lse", flattened<span_attention_lse_on<CudaSpanAttention>>);
  m.impl("_span_attention_forward", flattened<span_attention_forward_on<CudaSpanAttention>>);
  m.impl("_span_attention_backward", flattened<span_attention_backward_on<CudaSpanAttention>>);
}

}  // namespace torchops
