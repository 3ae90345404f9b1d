#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "span_attention/arguments.h"
#include "span_attention/cuda/launches.cuh"
#include "span_attention/cuda/lengths.h"

namespace torchops {
namespace {

SpanGradients span_attention_backward_cuda(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& output, const at::Tensor& logsumexp,
    c10::SymInt block_size, c10::SymInt left, c10::SymInt right, bool is_causal, std::optional<double> scale,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& sink,
    const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start,
    std::array<bool, 5> output_mask) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention_backward(grad_output, grad_logsumexp, query, key, value, output, logsumexp, options,
                                output_mask);
  check_lengths("_span_attention_backward", query, key);
  const c10::cuda::CUDAGuard guard(query.device());
  const SpanTensors inputs(query, key, value, options);
  const auto sizes = inputs.sizes();
  const auto grad = with_contiguous_rows(grad_output), out = with_contiguous_rows(output);
  const auto sums = logsumexp.contiguous();
  const auto grad_sums = grad_logsumexp ? grad_logsumexp->contiguous() : at::Tensor();
  const auto delta = at::empty(sums.sizes(), sums.options());
  // Gradients to side inputs are summed up in the accumulation dtype and rounded to their own at last.
  auto [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] =
      empty_gradients(query, key, value, options, {output_mask[0], output_mask[1], output_mask[2], false, false});
  const auto shares =
      output_mask[3] ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, sums.options()) : at::Tensor();

  for_dtype(query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    kernels::span_attention::launch_row_delta<T>(
        {heads<T>(grad), heads<T>(out), data_or_null<A>(grad_sums), delta.mutable_data_ptr<A>(), sizes});
    const kernels::span_attention::AttentionBackward<T> args{
        inputs.arguments<T>(),        heads<T>(grad),
        sums.const_data_ptr<A>(),     delta.const_data_ptr<A>(),
        mutable_heads<T>(grad_query), mutable_heads<T>(grad_key),
        mutable_heads<T>(grad_value), shares.defined() ? shares.mutable_data_ptr<A>() : nullptr};
    if (output_mask[0]) {
      kernels::span_attention::launch_query_gradient(args);
    }
    if (output_mask[1] || output_mask[2] || output_mask[3]) {
      kernels::span_attention::launch_key_gradient(args);
    }
    if (output_mask[3]) {
      grad_key_bias = at::empty({sizes.batch, sizes.num_keys}, sums.options());
      kernels::span_attention::launch_key_bias_gradient(shares.const_data_ptr<A>(), grad_key_bias.mutable_data_ptr<A>(),
                                                        sizes);
      grad_key_bias = grad_key_bias.to(key_bias->scalar_type());
    }
    if (output_mask[4]) {
      grad_sink = at::empty({sizes.num_heads}, sums.options());
      kernels::span_attention::launch_sink_gradient<A>({inputs.sink().const_data_ptr<A>(), sums.const_data_ptr<A>(),
                                                        delta.const_data_ptr<A>(), grad_sink.mutable_data_ptr<A>(),
                                                        sizes});
      grad_sink = grad_sink.to(sink->scalar_type());
    }
  });
  return {grad_query, grad_key, grad_value, grad_key_bias, grad_sink};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("_span_attention_backward", span_attention_backward_cuda);
}

}  // namespace torchops
