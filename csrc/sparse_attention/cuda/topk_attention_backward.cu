#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "sparse_attention/arguments.h"
#include "sparse_attention/cuda/sorted_lists.h"

namespace torchops {
namespace {

// [B, Hq, Lq], undefined where no gradient takes it.
at::Tensor delta_of_rows(const TopkBackward& backward) {
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
    kernels::sparse_attention::launch_row_delta<T>({heads<T>(grad), heads<T>(output), data_or_null<A>(grad_logsumexp),
                                                    delta.mutable_data_ptr<A>(), backward.row_sizes()});
  });
  return delta;
}

// In sink's own dtype at last.
at::Tensor gradient_to_sink(const TopkBackward& backward, const at::Tensor& delta) {
  const auto normalizer = backward.normalizer.contiguous();
  const auto sink = backward.options.sink->to(normalizer.scalar_type()).contiguous();
  auto gradient = at::empty(sink.sizes(), sink.options());
  const auto launch = [&](auto zero) {
    using A = decltype(zero);
    kernels::sparse_attention::launch_sink_gradient<A>({sink.const_data_ptr<A>(), normalizers<A>(normalizer),
                                                        delta.const_data_ptr<A>(), gradient.mutable_data_ptr<A>(),
                                                        backward.row_sizes()});
  };
  normalizer.scalar_type() == at::kDouble ? launch(0.0) : launch(0.0F);
  return gradient.to(backward.options.sink->scalar_type());
}

TopkGradients topk_attention_backward_cuda(const TopkBackward& backward) {
  check_topk_attention_backward(backward);
  const TopkMask& mask = backward.mask;
  const c10::cuda::CUDAGuard guard(backward.normalizer.device());
  // Gradients to side inputs are summed up in the accumulation dtype and rounded to their own at last.
  auto gradients = empty_gradients(backward, {{mask.query(), mask.key(), mask.value(), false, false, false}});
  auto& [grad_query, grad_key, grad_value, grad_key_bias, grad_pair_bias, grad_sink] = gradients;
  const auto delta = delta_of_rows(backward);
  if (mask.sink()) {
    grad_sink = gradient_to_sink(backward, delta);
  }
  if (!mask.probabilities()) {
    return gradients;
  }
  const TopkOptions& options = backward.options;
  const TopkTensors tensors(
      {*backward.query, *backward.key, backward.grad_output && mask.scores() ? *backward.value : at::Tensor(),
       *backward.indices, options},
      backward.value_dim());
  const auto sizes = tensors.sizes();
  const auto grad = backward.grad_output ? with_contiguous_rows(*backward.grad_output) : at::Tensor();
  const auto of_rows = backward.normalizer.contiguous();
  const auto shares =
      mask.key_bias() ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, of_rows.options()) : at::Tensor();
  const auto pair_shares = mask.pair_bias() ? at::zeros(tensors.pair_shape(), of_rows.options()) : at::Tensor();

  for_dtype(backward.query->scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const auto data = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.mutable_data_ptr<A>() : nullptr;
    };
    const kernels::sparse_attention::AttentionBackward<T> args{tensors.arguments<T>(),
                                                               heads<T>(grad),
                                                               normalizers<A>(of_rows),
                                                               mask.scores() ? data_or_null<A>(delta) : nullptr,
                                                               mutable_heads<T>(grad_query),
                                                               mutable_heads<T>(grad_key),
                                                               mutable_heads<T>(grad_value),
                                                               data(shares),
                                                               data(pair_shares)};
    const SortedListsOnDevice sorted(args.inputs, backward.query->options());
    if (mask.query() || mask.pair_bias()) {
      kernels::sparse_attention::launch_query_gradient(args, sorted.lists());
    }
    if (mask.key() || mask.value() || mask.key_bias()) {
      kernels::sparse_attention::launch_key_gradient(args, sorted.lists());
    }
    if (mask.key_bias()) {
      grad_key_bias = at::empty({sizes.batch, sizes.num_keys}, of_rows.options());
      kernels::sparse_attention::launch_key_bias_gradient(shares.const_data_ptr<A>(),
                                                          grad_key_bias.mutable_data_ptr<A>(), sizes);
      grad_key_bias = grad_key_bias.to(options.key_bias->scalar_type());
    }
  });
  if (mask.pair_bias()) {
    const auto of_heads = options.pair_bias->size(1);
    const auto of_each = of_heads == 0 ? 0 : sizes.num_heads / of_heads;
    grad_pair_bias = pair_shares.unflatten(1, {of_heads, of_each}).sum(2).to(options.pair_bias->scalar_type());
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("_topk_attention_backward", backward_boundary<topk_attention_backward_cuda>);
}

}  // namespace torchops
