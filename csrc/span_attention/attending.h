#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <tuple>

#include "span_attention/arguments.h"

// The operators as every device computes them. Device is made of the device it runs on, and has
//   static check(op, query, key): what it asks of their sizes
//   forward(AttentionForward<T>), with an output that is not empty
//   row_delta(RowDelta<T>)
//   sink_gradient(SinkGradient<A>)
//   backward(AttentionBackward<T>, mask), of query, key, value and the shares of key_bias
//   sum_of_shares(shares [B, Hkv, Lk], sizes) -> [B, Lk]

namespace torchops {

template <typename Device>
at::Tensor attend(const Device& device, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const SpanOptions& options, const at::Tensor& logsumexp, const at::Tensor& normalizer) {
  auto output = empty_with_layout_of(query, value.sym_size(3));
  if (output.numel() == 0) {
    return output;
  }
  const SpanTensors inputs(query, key, value, value.size(3), options);
  for_dtype(query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    device.forward(kernels::span_attention::AttentionForward<T>{
        inputs.arguments<T>(), mutable_heads<T>(output),
        logsumexp.defined() ? logsumexp.mutable_data_ptr<A>() : nullptr, normalizers<A>(normalizer)});
  });
  return output;
}

template <typename Device>
at::Tensor span_attention_on(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const SpanOptions& options) {
  check_span_attention("span_attention", query, key, value, options);
  Device::check("span_attention", query, key);
  return attend(Device(query.device()), query, key, value, options, {}, {});
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> span_attention_lse_on(const at::Tensor& query, const at::Tensor& key,
                                                         const at::Tensor& value, const SpanOptions& options) {
  check_span_attention("span_attention_lse", query, key, value, options);
  Device::check("span_attention_lse", query, key);
  const Device device(query.device());
  auto logsumexp = empty_logsumexp(query);
  auto output = attend(device, query, key, value, options, logsumexp, {});
  return {output, logsumexp};
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_forward_on(const at::Tensor& query, const at::Tensor& key,
                                                                         const at::Tensor& value,
                                                                         const SpanOptions& options) {
  check_span_attention("_span_attention_forward", query, key, value, options);
  Device::check("_span_attention_forward", query, key);
  const Device device(query.device());
  auto logsumexp = empty_logsumexp(query), normalizer = empty_normalizer(query);
  auto output = attend(device, query, key, value, options, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

// [B, Hq, Lq], undefined where no gradient takes it.
template <typename Device>
at::Tensor delta_of_rows(const Device& device, const SpanBackward& args) {
  if (!args.mask.delta()) {
    return {};
  }
  const auto grad_logsumexp = args.grad_logsumexp ? args.grad_logsumexp->contiguous() : at::Tensor();
  const auto rows = args.normalizer.sizes().slice(0, 3);
  if (!args.grad_output) {
    return grad_logsumexp.defined() ? grad_logsumexp.neg() : at::zeros(rows, args.normalizer.options());
  }
  const auto grad = with_contiguous_rows(*args.grad_output), output = with_contiguous_rows(*args.output);
  auto delta = at::empty(rows, args.normalizer.options());
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    device.row_delta(kernels::span_attention::RowDelta<T>{heads<T>(grad), heads<T>(output),
                                                          data_or_null<A>(grad_logsumexp), delta.mutable_data_ptr<A>(),
                                                          args.row_sizes()});
  });
  return delta;
}

// As kernels read it: contiguous, and aligned to two numbers, which rows of a wider tensor need not be.
inline at::Tensor aligned_normalizer(const at::Tensor& normalizer) {
  const auto result = normalizer.contiguous();
  const auto alignment = 2 * static_cast<uintptr_t>(result.element_size());
  return reinterpret_cast<uintptr_t>(result.const_data_ptr()) % alignment == 0 ? result : result.clone();
}

// In the accumulation dtype.
template <typename Device>
at::Tensor gradient_to_sink(const Device& device, const SpanBackward& args, const at::Tensor& delta) {
  const auto normalizer = aligned_normalizer(args.normalizer);
  const auto sink = args.options.sink->to(normalizer.scalar_type()).contiguous();
  auto gradient = at::empty(sink.sizes(), sink.options());
  const auto compute = [&](auto zero) {
    using A = decltype(zero);
    device.sink_gradient(kernels::span_attention::SinkGradient<A>{sink.const_data_ptr<A>(), normalizers<A>(normalizer),
                                                                  delta.const_data_ptr<A>(),
                                                                  gradient.mutable_data_ptr<A>(), args.row_sizes()});
  };
  normalizer.scalar_type() == at::kDouble ? compute(0.0) : compute(0.0F);
  return gradient;
}

template <typename Device>
SpanGradients span_attention_backward_on(const SpanBackward& args) {
  check_span_attention_backward(args);
  const SpanMask& mask = args.mask;
  if (args.query && args.key) {
    Device::check("_span_attention_backward", *args.query, *args.key);
  }
  const Device device(args.normalizer.device());
  // Gradients to side inputs are summed up in the accumulation dtype and rounded to their own at last.
  auto gradients = empty_gradients(args, {{mask.query(), mask.key(), mask.value(), false, false}});
  auto& [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] = gradients;
  const auto delta = delta_of_rows(device, args);
  if (mask.sink()) {
    grad_sink = gradient_to_sink(device, args, delta).to(args.options.sink->scalar_type());
  }
  if (!mask.probabilities()) {
    return gradients;
  }
  const SpanTensors inputs(*args.query, *args.key, args.grad_output && mask.scores() ? *args.value : at::Tensor(),
                           args.value_dim(), args.options);
  const auto sizes = inputs.sizes();
  const auto grad = args.grad_output ? with_contiguous_rows(*args.grad_output) : at::Tensor();
  const auto normalizer = aligned_normalizer(args.normalizer);
  const auto shares = mask.key_bias()
                          ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, normalizer.options())
                          : at::Tensor();
  const auto compute = [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    device.backward(
        kernels::span_attention::AttentionBackward<T>{
            inputs.arguments<T>(), heads<T>(grad), normalizers<A>(normalizer), data_or_null<A>(delta),
            mutable_heads<T>(std::get<0>(gradients)), mutable_heads<T>(std::get<1>(gradients)),
            mutable_heads<T>(std::get<2>(gradients)), shares.defined() ? shares.mutable_data_ptr<A>() : nullptr},
        mask);
  };
  for_dtype(args.query->scalar_type(), compute);
  if (mask.key_bias()) {
    grad_key_bias = device.sum_of_shares(shares, sizes).to(args.options.key_bias->scalar_type());
  }
  return gradients;
}

}  // namespace torchops
