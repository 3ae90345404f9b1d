#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>
#include <tuple>

#include "core/attention/attending.h"
#include "sparse_attention/arguments.h"

// topk_attention as every device computes it. Device is made of the device it runs on, resp. of the arguments of its
// backward, and has, beside what core/attention/attending.h asks,
//   forward(AttentionForward<T>), with an output that is not empty
//   backward(AttentionBackward<T>, mask), of query, key, value and the shares of key_bias and pair_bias

namespace torchops {

template <typename Device>
at::Tensor attend(const Device& device, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& indices, const TopkOptions& options, const at::Tensor& logsumexp,
                  const at::Tensor& normalizer) {
  auto output = empty_with_layout_of(query, value.sym_size(3));
  if (output.numel() > 0) {
    attend(device, TopkTensors(query, key, value, value.size(3), indices, options), output, logsumexp, normalizer);
  }
  return output;
}

template <typename Device>
at::Tensor topk_attention_on(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const at::Tensor& indices, const TopkOptions& options) {
  check_topk_attention("topk_attention", query, key, value, indices, options);
  return attend(Device(query.device()), query, key, value, indices, options, {}, {});
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor> topk_attention_lse_on(const at::Tensor& query, const at::Tensor& key,
                                                         const at::Tensor& value, const at::Tensor& indices,
                                                         const TopkOptions& options) {
  check_topk_attention("topk_attention_lse", query, key, value, indices, options);
  const Device device(query.device());
  auto logsumexp = empty_logsumexp(query);
  auto output = attend(device, query, key, value, indices, options, logsumexp, {});
  return {output, logsumexp};
}

template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_attention_forward_on(const at::Tensor& query, const at::Tensor& key,
                                                                         const at::Tensor& value,
                                                                         const at::Tensor& indices,
                                                                         const TopkOptions& options) {
  check_topk_attention("_topk_attention_forward", query, key, value, indices, options);
  const Device device(query.device());
  auto logsumexp = empty_logsumexp(query), normalizer = empty_normalizer(query);
  auto output = attend(device, query, key, value, indices, options, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

// Shares of heads, one behind the other, to the gradient of what they share.
inline at::Tensor sum_of_heads(const at::Tensor& shares, const at::Tensor& shared) {
  const auto heads = shared.size(1);
  return shares.unflatten(1, {heads, heads == 0 ? 0 : shares.size(1) / heads}).sum(2).to(shared.scalar_type());
}

// Gradients to what `mask` asks for. tensors_of(value) are the inputs as kernels take them; value is undefined where no
// gradient is made of it.
template <typename Device, typename TensorsOf>
TopkGradients gradients_over_lists(const Device& device, const AttentionGradients& args, const AttentionSides& sides,
                                   const std::optional<at::Tensor>& pair_bias, const TopkMask& mask,
                                   const TensorsOf& tensors_of) {
  auto [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] =
      empty_attention_gradients(args, sides, mask.of_rows());
  at::Tensor grad_pair_bias;
  const auto delta = delta_of_rows(device, args, mask.delta());
  if (mask.sink()) {
    grad_sink = gradient_to_sink(device, args, *sides.sink, delta);
  }
  if (mask.probabilities()) {
    const auto inputs = tensors_of(args.grad_output && mask.scores() ? *args.value : at::Tensor());
    const auto sizes = inputs.sizes();
    const BackwardTensors tensors(args, mask, delta, sizes);
    // A query head's each.
    const auto pair_shares =
        mask.pair_bias()
            ? at::zeros({sizes.batch, sizes.num_heads, pair_bias->size(2), pair_bias->size(3)}, tensors.options())
            : at::Tensor();
    const std::array rows{grad_query, grad_key, grad_value};
    for_dtype(args.query->scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = kernels::accumulate_t<T>;
      device.backward(
          kernels::sparse_attention::AttentionBackward<T>{
              tensors.template arguments<T>(inputs.template arguments<T>(), rows[0], rows[1], rows[2]),
              mutable_data_or_null<A>(pair_shares)},
          mask);
    });
    if (mask.key_bias()) {
      grad_key_bias = device.sum_of_shares(tensors.key_bias_shares(), sizes).to(sides.key_bias->scalar_type());
    }
    if (mask.pair_bias()) {
      grad_pair_bias = sum_of_heads(pair_shares, *pair_bias);
    }
  }
  return {grad_query, grad_key, grad_value, grad_key_bias, grad_sink, grad_pair_bias};
}

template <typename Device>
TopkGradients topk_attention_backward_on(const TopkBackward& args) {
  check_topk_attention_backward(args);
  return gradients_over_lists(
      Device(args), args, args.options, args.options.pair_bias, args.mask, [&](const at::Tensor& value) {
        return TopkTensors(*args.query, *args.key, value, args.value_dim(), *args.indices, args.options);
      });
}

}  // namespace torchops
