#include "sparse_attention/sparse_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "core/cpu/aligned_buffer.h"
#include "core/parallel.h"
#include "span_attention/cpu/delta_kernel.h"
#include "sparse_attention/arguments.h"
#include "sparse_attention/cpu/backward_kernel.h"
#include "sparse_attention/cpu/forward_kernel.h"

namespace torchops {
namespace {

using kernels::sparse_attention::Attention;
using kernels::sparse_attention::Sizes;

// At most what the queries of a unit cost: several multiplications of a product are one operation.
template <typename T>
int64_t unit_cost(const Attention<T>& inputs) {
  constexpr int64_t at_once = 4;
  const int64_t listed = std::min(inputs.lists.num_listed, inputs.sizes.num_keys) *
                         std::min(inputs.rule.block_size, inputs.sizes.num_keys);
  return std::max<int64_t>(inputs.rule.query_block, 64) * std::min(listed, inputs.sizes.num_keys) *
         (inputs.sizes.head_dim + inputs.sizes.value_dim) / at_once;
}

template <typename Work>
void parallel_tiles(int64_t count, int64_t cost, int64_t scratch_bytes, const Work& work) {
  parallel_units(count, cost, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    work(scratch.data(), begin, end);
  });
}

void forward(const TopkInputs& inputs, const at::Tensor& output, const at::Tensor& logsumexp,
             const at::Tensor& normalizer) {
  if (output.numel() == 0) {
    return;
  }
  const TopkTensors tensors(inputs, inputs.value.size(3));
  for_dtype(inputs.query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const kernels::sparse_attention::AttentionForward<T> args{
        tensors.arguments<T>(), mutable_heads<T>(output),
        logsumexp.defined() ? logsumexp.mutable_data_ptr<A>() : nullptr, normalizers<A>(normalizer)};
    const Sizes& sizes = args.inputs.sizes;
    const auto units = TORCHOPS_KERNEL(sparse_attention, forward_units<T>)(args.inputs);
    parallel_tiles(sizes.batch * sizes.num_heads * units, unit_cost(args.inputs),
                   TORCHOPS_KERNEL(sparse_attention, forward_scratch_bytes<T>)(args.inputs),
                   [&](char* scratch, int64_t begin, int64_t end) {
                     TORCHOPS_KERNEL(sparse_attention, forward<T>)(args, scratch, begin, end);
                   });
  });
}

at::Tensor topk_attention_cpu(const TopkInputs& inputs) {
  check_topk_attention("topk_attention", inputs);
  auto output = empty_with_layout_of(inputs.query, inputs.value.sym_size(3));
  forward(inputs, output, {}, {});
  return output;
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse_cpu(const TopkInputs& inputs) {
  check_topk_attention("topk_attention_lse", inputs);
  auto output = empty_with_layout_of(inputs.query, inputs.value.sym_size(3));
  auto logsumexp = empty_logsumexp(inputs.query);
  forward(inputs, output, logsumexp, {});
  return {output, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_attention_forward_cpu(const TopkInputs& inputs) {
  check_topk_attention("_topk_attention_forward", inputs);
  auto output = empty_with_layout_of(inputs.query, inputs.value.sym_size(3));
  auto logsumexp = empty_logsumexp(inputs.query), normalizer = empty_normalizer(inputs.query);
  forward(inputs, output, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

// [B, Hq, Lq], undefined where no gradient takes it.
at::Tensor delta_of_rows(const TopkBackward& backward) {
  if (!backward.mask.delta()) {
    return {};
  }
  const auto grad_logsumexp = backward.grad_logsumexp ? backward.grad_logsumexp->contiguous() : at::Tensor();
  if (!backward.grad_output) {
    return grad_logsumexp.defined() ? grad_logsumexp.neg()
                                    : at::zeros(backward.normalizer.sizes().slice(0, 3), backward.normalizer.options());
  }
  const auto grad = with_contiguous_rows(*backward.grad_output), output = with_contiguous_rows(*backward.output);
  const auto delta = at::empty(backward.normalizer.sizes().slice(0, 3), backward.normalizer.options());
  const auto sizes = backward.row_sizes();
  for_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const kernels::sparse_attention::RowDelta<T> args{heads<T>(grad), heads<T>(output), data_or_null<A>(grad_logsumexp),
                                                      delta.mutable_data_ptr<A>(), sizes};
    parallel_units(delta.numel(), sizes.value_dim, [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(sparse_attention, row_delta<T>)(args, begin, end);
    });
  });
  return delta;
}

void compute_sink_gradient(const TopkBackward& backward, const at::Tensor& delta, const at::Tensor& grad_sink) {
  const auto normalizer = backward.normalizer.contiguous();
  const auto sink = backward.options.sink->to(normalizer.scalar_type()).contiguous();
  const auto gradient = at::empty(sink.sizes(), sink.options());
  const auto sizes = backward.row_sizes();
  const auto compute = [&](auto zero) {
    using A = decltype(zero);
    const kernels::span_attention::SinkGradient<A> args{sink.const_data_ptr<A>(), normalizers<A>(normalizer),
                                                        delta.const_data_ptr<A>(), gradient.mutable_data_ptr<A>(),
                                                        sizes};
    parallel_units(sizes.num_heads, sizes.batch * sizes.num_queries, [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(span_attention, sink_gradient<A>)(args, begin, end);
    });
  };
  normalizer.scalar_type() == at::kDouble ? compute(0.0) : compute(0.0F);
  grad_sink.copy_(gradient);
}

template <typename T>
void compute_gradients(const kernels::sparse_attention::AttentionBackward<T>& args, const TopkMask& mask) {
  const Attention<T>& inputs = args.inputs;
  const Sizes& sizes = inputs.sizes;
  const bool for_queries = mask.query() || mask.pair_bias();
  const bool for_keys = mask.key() || mask.value() || mask.key_bias();
  const auto units = TORCHOPS_KERNEL(sparse_attention, backward_query_units<T>)(inputs);
  const auto scratch_bytes = [&](int64_t num_keys) {
    return TORCHOPS_KERNEL(sparse_attention, backward_scratch_bytes<T>)(args, num_keys);
  };
  // A pass over whole heads computes the probabilities once instead of twice; heads that do not fill the threads are
  // cut into tiles of queries and ranges of keys.
  const int64_t heads = sizes.batch * sizes.num_kv_heads, threads = at::get_num_threads();
  const int64_t whole = for_queries && for_keys ? heads / threads * threads : 0;
  parallel_tiles(whole, 4 * sizes.group_size() * units * unit_cost(inputs),
                 whole > 0 ? scratch_bytes(sizes.num_keys) : 0, [&](char* scratch, int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(sparse_attention, backward_heads<T>)(args, scratch, begin, end);
                 });
  const int64_t rest = heads - whole;
  parallel_tiles(for_queries ? rest * sizes.group_size() * units : 0, 2 * unit_cost(inputs), scratch_bytes(0),
                 [&](char* scratch, int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(sparse_attention, backward_queries<T>)(args, whole, scratch, begin, end);
                 });
  // Every range looks at every list: no more of them than fill the threads.
  const int64_t ranges = rest == 0 ? 1 : std::max<int64_t>((threads + rest - 1) / rest, 1);
  const int64_t keys_at_a_time = std::max<int64_t>((sizes.num_keys + ranges - 1) / ranges, 1);
  parallel_tiles(for_keys ? rest * ((sizes.num_keys + keys_at_a_time - 1) / keys_at_a_time) : 0,
                 2 * sizes.group_size() * units * unit_cost(inputs), scratch_bytes(keys_at_a_time),
                 [&](char* scratch, int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(sparse_attention, backward_keys<T>)
                   (args, whole, keys_at_a_time, scratch, begin, end);
                 });
}

// Shares of heads, one behind the other, to the gradient of what they share.
void add_shares(const at::Tensor& shares, const at::Tensor& gradient) {
  const auto heads = gradient.size(1);
  gradient.copy_(shares.unflatten(1, {heads, heads == 0 ? 0 : shares.size(1) / heads}).sum(2));
}

TopkGradients topk_attention_backward_cpu(const TopkBackward& backward) {
  check_topk_attention_backward(backward);
  const TopkMask& mask = backward.mask;
  auto gradients = empty_gradients(backward, mask);
  auto& [grad_query, grad_key, grad_value, grad_key_bias, grad_pair_bias, grad_sink] = gradients;
  const auto delta = delta_of_rows(backward);
  if (mask.sink()) {
    compute_sink_gradient(backward, delta, grad_sink);
  }
  if (!mask.probabilities()) {
    return gradients;
  }
  const TopkTensors tensors(
      {*backward.query, *backward.key, backward.grad_output && mask.scores() ? *backward.value : at::Tensor(),
       *backward.indices, backward.options},
      backward.value_dim());
  const auto sizes = tensors.sizes();
  const auto grad = backward.grad_output ? with_contiguous_rows(*backward.grad_output) : at::Tensor();
  const auto of_rows = backward.normalizer.contiguous();
  const auto options = of_rows.options();
  const auto bias_shares =
      mask.key_bias() ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, options) : at::Tensor();
  const auto pair_shares = mask.pair_bias() ? at::zeros(tensors.pair_shape(), options) : at::Tensor();

  for_dtype(backward.query->scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const auto shares = [](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.mutable_data_ptr<A>() : nullptr;
    };
    compute_gradients<T>(
        {tensors.arguments<T>(), heads<T>(grad), normalizers<A>(of_rows),
         mask.scores() ? data_or_null<A>(delta) : nullptr, mutable_heads<T>(grad_query), mutable_heads<T>(grad_key),
         mutable_heads<T>(grad_value), shares(bias_shares), shares(pair_shares)},
        mask);
  });
  if (mask.key_bias()) {
    grad_key_bias.copy_(bias_shares.sum(1));
  }
  if (mask.pair_bias()) {
    add_shares(pair_shares, grad_pair_bias);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CPU, m) {
  m.impl("topk_attention", boundary<topk_attention_cpu>);
  m.impl("topk_attention_lse", boundary<topk_attention_lse_cpu>);
  m.impl("_topk_attention_forward", boundary<topk_attention_forward_cpu>);
  m.impl("_topk_attention_backward", backward_boundary<topk_attention_backward_cpu>);
}

}  // namespace torchops
