#include "span_attention/span_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "core/cpu/aligned_buffer.h"
#include "core/parallel.h"
#include "span_attention/arguments.h"
#include "span_attention/cpu/backward_kernel.h"
#include "span_attention/cpu/decode_kernel.h"
#include "span_attention/cpu/delta_kernel.h"
#include "span_attention/cpu/forward_kernel.h"

namespace torchops {
namespace {

using kernels::span_attention::Sizes;

// Key-value heads that are packed at a time: enough for all threads, and as many as stay in the caches.
int64_t heads_in_a_wave(const Sizes& sizes, int64_t bytes_of_head) {
  constexpr int64_t bytes_of_wave = int64_t{8} << 20;
  const int64_t threads = at::get_num_threads();
  const int64_t fitting = bytes_of_wave / std::max<int64_t>(bytes_of_head, 1) / threads * threads;
  return std::min(std::max(threads, fitting), sizes.batch * sizes.num_kv_heads);
}

// Calls work(first head, heads, packs) for each wave.
template <typename Work>
void for_each_wave(const Sizes& sizes, int64_t bytes_of_head, const Work& work) {
  const int64_t num_heads = sizes.batch * sizes.num_kv_heads;
  const int64_t wave = heads_in_a_wave(sizes, bytes_of_head);
  AlignedBuffer<char> packs(static_cast<size_t>(wave * bytes_of_head));
  for (int64_t first = 0; first < num_heads; first += wave) {
    work(first, std::min(wave, num_heads - first), packs.data());
  }
}

// At most what a tile of `rows` queries or keys costs: several multiplications of a product are one operation.
int64_t tile_cost(const Sizes& sizes, int64_t rows, int64_t others) {
  constexpr int64_t at_once = 4;
  return std::min<int64_t>(rows, 64) * others * (sizes.head_dim + sizes.value_dim) / at_once;
}

template <typename Work>
void parallel_tiles(int64_t count, int64_t cost, int64_t scratch_bytes, const Work& work) {
  parallel_units(count, cost, [&](int64_t begin, int64_t end) {
    AlignedBuffer<char> scratch(static_cast<size_t>(scratch_bytes));
    work(scratch.data(), begin, end);
  });
}

// Few queries without a backward to come; whether they are few enough.
template <typename T>
bool decode(const kernels::span_attention::AttentionForward<T>& args) {
  const Sizes& sizes = args.inputs.sizes;
  const auto pieces = args.normalizer != nullptr ? 0 : TORCHOPS_KERNEL(span_attention, decode_pieces<T>)(args.inputs);
  if (pieces == 0) {
    return false;
  }
  AlignedBuffer<char> partials(
      static_cast<size_t>(TORCHOPS_KERNEL(span_attention, decode_partial_bytes<T>)(args.inputs)));
  const auto scratch_bytes = TORCHOPS_KERNEL(span_attention, decode_scratch_bytes<T>)(args.inputs);
  const int64_t rows = sizes.num_queries * sizes.group_size();
  parallel_tiles(sizes.batch * sizes.num_kv_heads * pieces, tile_cost(sizes, rows + 3, sizes.num_keys / pieces),
                 scratch_bytes, [&](char* scratch, int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(span_attention, decode<T>)(args.inputs, partials.data(), scratch, begin, end);
                 });
  parallel_units(sizes.batch * sizes.num_heads * sizes.num_queries, pieces * sizes.value_dim,
                 [&](int64_t begin, int64_t end) {
                   TORCHOPS_KERNEL(span_attention, decode_merge<T>)(args, partials.data(), begin, end);
                 });
  return true;
}

void forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const SpanOptions& options,
             const at::Tensor& output, const at::Tensor& logsumexp, const at::Tensor& normalizer) {
  if (output.numel() == 0) {
    return;
  }
  const SpanTensors tensors(query, key, value, value.size(3), options);
  for_dtype(query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const kernels::span_attention::AttentionForward<T> args{
        tensors.arguments<T>(), mutable_heads<T>(output),
        logsumexp.defined() ? logsumexp.mutable_data_ptr<A>() : nullptr, normalizers<A>(normalizer)};
    if (decode(args)) {
      return;
    }
    const Sizes& sizes = args.inputs.sizes;
    const auto pack_bytes = TORCHOPS_KERNEL(span_attention, forward_pack_bytes<T>)(sizes);
    const auto pack_units = TORCHOPS_KERNEL(span_attention, forward_pack_units<T>)(sizes);
    const auto units = TORCHOPS_KERNEL(span_attention, forward_units<T>)(sizes);
    const auto scratch_bytes = TORCHOPS_KERNEL(span_attention, forward_scratch_bytes<T>)(sizes);
    for_each_wave(sizes, pack_bytes, [&](int64_t first, int64_t heads, char* packs) {
      parallel_units(heads * pack_units, sizes.head_dim * 256, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(span_attention, forward_pack<T>)(args.inputs, first, packs, begin, end);
      });
      parallel_tiles(heads * units, tile_cost(sizes, sizes.num_queries, sizes.num_keys), scratch_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, forward<T>)(args, first, packs, scratch, begin, end);
                     });
    });
  });
}

at::Tensor span_attention_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              c10::SymInt block_size, c10::SymInt left, c10::SymInt right, bool is_causal,
                              std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
                              const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
                              const std::optional<at::Tensor>& key_start) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention("span_attention", query, key, value, options);
  auto output = empty_with_layout_of(query, value.sym_size(3));
  forward(query, key, value, options, output, {}, {});
  return output;
}

std::tuple<at::Tensor, at::Tensor> span_attention_lse_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, c10::SymInt block_size, c10::SymInt left,
    c10::SymInt right, bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
    const std::optional<at::Tensor>& key_start) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention("span_attention_lse", query, key, value, options);
  auto output = empty_with_layout_of(query, value.sym_size(3));
  auto logsumexp = empty_logsumexp(query);
  forward(query, key, value, options, output, logsumexp, {});
  return {output, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_forward_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, c10::SymInt block_size, c10::SymInt left,
    c10::SymInt right, bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
    const std::optional<at::Tensor>& key_start) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention("_span_attention_forward", query, key, value, options);
  auto output = empty_with_layout_of(query, value.sym_size(3));
  auto logsumexp = empty_logsumexp(query), normalizer = empty_normalizer(query);
  forward(query, key, value, options, output, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

// [B, Hq, Lq], undefined where no gradient takes it.
at::Tensor delta_of_rows(const SpanBackward& backward) {
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
    const kernels::span_attention::RowDelta<T> args{heads<T>(grad), heads<T>(output), data_or_null<A>(grad_logsumexp),
                                                    delta.mutable_data_ptr<A>(), sizes};
    parallel_units(delta.numel(), sizes.value_dim, [&](int64_t begin, int64_t end) {
      TORCHOPS_KERNEL(span_attention, row_delta<T>)(args, begin, end);
    });
  });
  return delta;
}

void compute_sink_gradient(const SpanBackward& backward, const at::Tensor& delta, const at::Tensor& grad_sink) {
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

SpanGradients span_attention_backward_cpu(const std::optional<at::Tensor>& grad_output,
                                          const std::optional<at::Tensor>& grad_logsumexp,
                                          const std::optional<at::Tensor>& query, const std::optional<at::Tensor>& key,
                                          const std::optional<at::Tensor>& value,
                                          const std::optional<at::Tensor>& output, const at::Tensor& normalizer,
                                          c10::SymInt block_size, c10::SymInt left, c10::SymInt right, bool is_causal,
                                          std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
                                          const std::optional<at::Tensor>& sink,
                                          const std::optional<at::Tensor>& query_start,
                                          const std::optional<at::Tensor>& key_start, std::array<bool, 5> output_mask) {
  const SpanBackward backward{
      grad_output,  grad_logsumexp,
      query,        key,
      value,        output,
      normalizer,   {block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start},
      {output_mask}};
  check_span_attention_backward(backward);
  const SpanMask& mask = backward.mask;
  auto gradients = empty_gradients(backward, mask);
  auto& [grad_query, grad_key, grad_value, grad_key_bias, grad_sink] = gradients;
  const auto delta = delta_of_rows(backward);
  if (mask.sink()) {
    compute_sink_gradient(backward, delta, grad_sink);
  }
  if (!mask.probabilities()) {
    return gradients;
  }
  const SpanTensors tensors(*query, *key, grad_output && mask.scores() ? *value : at::Tensor(), backward.value_dim(),
                            backward.options);
  const auto sizes = tensors.sizes();
  const auto grad = grad_output ? with_contiguous_rows(*grad_output) : at::Tensor();
  const auto of_rows = normalizer.contiguous();
  const auto bias_shares = mask.key_bias()
                               ? at::empty({sizes.batch, sizes.num_kv_heads, sizes.num_keys}, normalizer.options())
                               : at::Tensor();

  for_dtype(query->scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const bool for_queries = mask.query();
    const bool for_keys = mask.key() || mask.value() || mask.key_bias();
    const kernels::span_attention::AttentionBackward<T> args{
        tensors.arguments<T>(),       heads<T>(grad),
        normalizers<A>(of_rows),      data_or_null<A>(delta),
        mutable_heads<T>(grad_query), mutable_heads<T>(grad_key),
        mutable_heads<T>(grad_value), bias_shares.defined() ? bias_shares.mutable_data_ptr<A>() : nullptr};
    const auto pack_bytes = TORCHOPS_KERNEL(span_attention, backward_pack_bytes<T>)(sizes);
    const auto pack_units = TORCHOPS_KERNEL(span_attention, backward_pack_units<T>)(sizes);
    const auto query_units = TORCHOPS_KERNEL(span_attention, backward_query_units<T>)(sizes);
    const auto key_units = TORCHOPS_KERNEL(span_attention, backward_key_units<T>)(sizes);
    const auto whole_bytes = TORCHOPS_KERNEL(span_attention, backward_scratch_bytes<T>)(sizes, true);
    const auto tile_bytes = TORCHOPS_KERNEL(span_attention, backward_scratch_bytes<T>)(sizes, false);
    for_each_wave(sizes, pack_bytes, [&](int64_t first, int64_t heads, char* packs) {
      parallel_units(heads * pack_units, sizes.head_dim * 512, [&](int64_t begin, int64_t end) {
        TORCHOPS_KERNEL(span_attention, backward_pack<T>)(args, first, packs, begin, end);
      });
      // A pass over whole heads computes the probabilities once instead of twice; heads that do not fill
      // the threads are cut into tiles.
      const int64_t threads = at::get_num_threads();
      const int64_t whole = for_queries && for_keys ? heads / threads * threads : 0;
      parallel_tiles(whole, 4 * query_units * tile_cost(sizes, sizes.num_queries, sizes.num_keys), whole_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, backward_heads<T>)(args, first, packs, scratch, begin, end);
                     });
      char* const rest = packs + whole * pack_bytes;
      parallel_tiles(for_queries ? (heads - whole) * query_units : 0,
                     2 * tile_cost(sizes, sizes.num_queries, sizes.num_keys), tile_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, backward_queries<T>)
                       (args, first + whole, rest, scratch, begin, end);
                     });
      parallel_tiles(for_keys ? (heads - whole) * key_units : 0,
                     2 * sizes.group_size() * tile_cost(sizes, sizes.num_keys, sizes.num_queries), tile_bytes,
                     [&](char* scratch, int64_t begin, int64_t end) {
                       TORCHOPS_KERNEL(span_attention, backward_keys<T>)
                       (args, first + whole, rest, scratch, begin, end);
                     });
    });
  });
  if (mask.key_bias()) {
    grad_key_bias.copy_(bias_shares.sum(1));
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CPU, m) {
  m.impl("span_attention", span_attention_cpu);
  m.impl("span_attention_lse", span_attention_lse_cpu);
  m.impl("_span_attention_forward", span_attention_forward_cpu);
  m.impl("_span_attention_backward", span_attention_backward_cpu);
}

}  // namespace torchops
