#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "span_attention/arguments.h"
#include "span_attention/cuda/launches.cuh"
#include "span_attention/cuda/lengths.h"

namespace torchops {
namespace {

// [B, Hq, Lq], undefined where no gradient takes it.
at::Tensor delta_of_rows(const SpanBackward& backward) {
  if (!backward.mask.delta()) {
    return {};
  }
  const auto grad_logsumexp = backward.grad_logsumexp ? backward.grad_logsumexp->contiguous() : at::Tensor();
  const auto rows = backward.normalizer.sizes().slice(0, 3);
  if (!backward.grad_output) {
    return grad_logsumexp.defined() ? grad_logsumexp.neg() : at::zeros(rows, backward.normalizer.options());
  }
  const auto grad = with_contiguous_rows(*backward.grad_output), output = with_contiguous_rows(*backward.output);
  auto delta = at::empty(rows, backward.normalizer.options());
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    kernels::span_attention::launch_row_delta<T>({heads<T>(grad), heads<T>(output), data_or_null<A>(grad_logsumexp),
                                                  delta.mutable_data_ptr<A>(), backward.row_sizes()});
  });
  return delta;
}

// In sink's own dtype at last.
at::Tensor gradient_to_sink(const SpanBackward& backward, const at::Tensor& delta) {
  const auto normalizer = backward.normalizer.contiguous();
  const auto sink = backward.options.sink->to(normalizer.scalar_type()).contiguous();
  auto gradient = at::empty(sink.sizes(), sink.options());
  const auto launch = [&](auto zero) {
    using A = decltype(zero);
    kernels::span_attention::launch_sink_gradient<A>({sink.const_data_ptr<A>(), normalizers<A>(normalizer),
                                                      delta.const_data_ptr<A>(), gradient.mutable_data_ptr<A>(),
                                                      backward.row_sizes()});
  };
  normalizer.scalar_type() == at::kDouble ? launch(0.0) : launch(0.0F);
  return gradient.to(backward.options.sink->scalar_type());
}

SpanGradients span_attention_backward_cuda(
    const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_logsumexp,
    const std::optional<at::Tensor>& query, const std::optional<at::Tensor>& key,
    const std::optional<at::Tensor>& value, const std::optional<at::Tensor>& output, const at::Tensor& normalizer,
    c10::SymInt block_size, c10::SymInt left, c10::SymInt right, bool is_causal, std::optional<double> scale,
    const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& sink,
    const std::optional<at::Tensor>& query_start, const std::optional<at::Tensor>& key_start,
    std::array<bool, 5> output_mask) {
  const SpanBackward backward{
      grad_output,  grad_logsumexp,
      query,        key,
      value,        output,
      normalizer,   {block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start},
      {output_mask}};
  check_span_attention_backward(backward);
  const SpanMask& mask = backward.mask;
  if (query && key) {
    check_lengths("_span_attention_backward", *query, *key);
  }
  const c10::cuda::CUDAGuard guard(normalizer.device());
  // Gradients to side inputs are summed up in the accumulation dtype and rounded to their own at last.
  auto gradients = empty_gradients(backward, {{mask.query(), mask.key(), mask.value(), false, false}});
  auto& [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] = gradients;
  const auto delta = delta_of_rows(backward);
  if (mask.sink()) {
    grad_sink = gradient_to_sink(backward, delta);
  }
  if (!mask.probabilities()) {
    return gradients;
  }
  const SpanTensors inputs(*query, *key, grad_output && mask.scores() ? *value : at::Tensor(), backward.value_dim(),
                           backward.options);
  const auto sizes = inputs.sizes();
  const auto grad = grad_output ? with_contiguous_rows(*grad_output) : at::Tensor();
  const auto of_rows = normalizer.contiguous();
  const auto shares = mask.key_bias()
                          ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, normalizer.options())
                          : at::Tensor();

  for_dtype(query->scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const kernels::span_attention::AttentionBackward<T> args{
        inputs.arguments<T>(),        heads<T>(grad),
        normalizers<A>(of_rows),      data_or_null<A>(delta),
        mutable_heads<T>(grad_query), mutable_heads<T>(grad_key),
        mutable_heads<T>(grad_value), shares.defined() ? shares.mutable_data_ptr<A>() : nullptr};
    if (mask.query()) {
      kernels::span_attention::launch_query_gradient(args);
    }
    if (mask.key() || mask.value() || mask.key_bias()) {
      kernels::span_attention::launch_key_gradient(args);
    }
    if (mask.key_bias()) {
      grad_key_bias = at::empty({sizes.batch, sizes.num_keys}, normalizer.options());
      kernels::span_attention::launch_key_bias_gradient(shares.const_data_ptr<A>(), grad_key_bias.mutable_data_ptr<A>(),
                                                        sizes);
      grad_key_bias = grad_key_bias.to(key_bias->scalar_type());
    }
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("_span_attention_backward", span_attention_backward_cuda);
}

}  // namespace torchops
