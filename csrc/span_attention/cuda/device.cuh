#pragma once

#include <ATen/ops/empty.h>

#include "span_attention/attending.h"
#include "span_attention/cuda/launches.cuh"
#include "span_attention/cuda/lengths.h"

namespace torchops {

// A CUDA device, for span_attention/attending.h.
class CudaSpanAttention {
 public:
  explicit CudaSpanAttention(at::Device device) : device_(device), guard_(device) {}

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
    const auto options = at::TensorOptions().device(device_).dtype(c10::CppTypeToScalarType<A>::value);
    const auto results = at::empty({rows, pieces, sizes.value_dim}, options);
    const auto softmax = at::empty({rows, pieces, 2}, options);
    kernels::span_attention::launch_decode(
        args, {results.template mutable_data_ptr<A>(), softmax.template mutable_data_ptr<A>(), pieces});
  }

  template <typename T>
  void row_delta(const kernels::span_attention::RowDelta<T>& args) const {
    kernels::span_attention::launch_row_delta(args);
  }

  template <typename A>
  void sink_gradient(const kernels::span_attention::SinkGradient<A>& args) const {
    kernels::span_attention::launch_sink_gradient(args);
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

  at::Tensor sum_of_shares(const at::Tensor& shares, const kernels::span_attention::Sizes& sizes) const {
    auto sum = at::empty({sizes.batch, sizes.num_keys}, shares.options());
    const auto launch = [&](auto zero) {
      using A = decltype(zero);
      kernels::span_attention::launch_key_bias_gradient(shares.const_data_ptr<A>(), sum.mutable_data_ptr<A>(), sizes);
    };
    shares.scalar_type() == at::kDouble ? launch(0.0) : launch(0.0F);
    return sum;
  }

 private:
  at::Device device_;
  c10::cuda::CUDAGuard guard_;
};

}  // namespace torchops
