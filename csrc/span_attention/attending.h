#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "core/attention/attending.h"
#include "span_attention/arguments.h"

// The operators as every device computes them. Device is made of the device it runs on, and has, beside what
// core/attention/attending.h asks,
//   static check(op, query, key): what it asks of their sizes
//   forward(AttentionForward<T>), with an output that is not empty
//   backward(AttentionBackward<T>, mask), of query, key, value and the shares of key_bias

namespace torchops {

template <typename Device>
at::Tensor attend(const Device& device, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const SpanOptions& options, const at::Tensor& logsumexp, const at::Tensor& normalizer) {
  auto output = empty_with_layout_of(query, value.sym_size(3));
  if (output.numel() > 0) {
    attend(device, SpanTensors(query, key, value, value.size(3), options), output, logsumexp, normalizer);
  }
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

template <typename Device>
SpanGradients span_attention_backward_on(const SpanBackward& args) {
  check_span_attention_backward(args);
  const SpanMask& mask = args.mask;
  if (args.query && args.key) {
    Device::check("_span_attention_backward", *args.query, *args.key);
  }
  const Device device(args.normalizer.device());
  auto gradients = empty_attention_gradients(args, args.options, mask.of_rows());
  auto& [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] = gradients;
  const auto delta = delta_of_rows(device, args, mask.delta());
  if (mask.sink()) {
    grad_sink = gradient_to_sink(device, args, *args.options.sink, delta);
  }
  if (!mask.probabilities()) {
    return gradients;
  }
  const SpanTensors inputs(*args.query, *args.key, args.grad_output && mask.scores() ? *args.value : at::Tensor(),
                           args.value_dim(), args.options);
  const BackwardTensors tensors(args, mask, delta, inputs.sizes());
  for_dtype(args.query->scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    device.backward(tensors.arguments<T>(inputs.arguments<T>(), std::get<0>(gradients), std::get<1>(gradients),
                                         std::get<2>(gradients)),
                    mask);
  });
  if (mask.key_bias()) {
    grad_key_bias =
        device.sum_of_shares(tensors.key_bias_shares(), inputs.sizes()).to(args.options.key_bias->scalar_type());
  }
  return gradients;
}

}  // namespace torchops
