#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "span_attention/arguments.h"
#include "span_attention/cuda/launches.cuh"
#include "span_attention/cuda/lengths.h"

namespace torchops {
namespace {

template <typename T>
void forward(const kernels::span_attention::AttentionForward<T>& args, const at::Tensor& output) {
  if (!kernels::span_attention::decodes(args)) {
    return kernels::span_attention::launch_forward(args);
  }
  using A = kernels::accumulate_t<T>;
  const auto& sizes = args.inputs.sizes;
  const auto pieces = kernels::span_attention::decode_pieces(sizes, args.inputs.span);
  const auto options = output.options().dtype(c10::CppTypeToScalarType<A>::value);
  const auto results = at::empty({output.numel() / sizes.value_dim, pieces, sizes.value_dim}, options);
  const auto softmax = at::empty({output.numel() / sizes.value_dim, pieces, 2}, options);
  kernels::span_attention::launch_decode(
      args, {results.template mutable_data_ptr<A>(), softmax.template mutable_data_ptr<A>(), pieces});
}

at::Tensor span_attention_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const SpanOptions& options, const at::Tensor& logsumexp, const at::Tensor& normalizer) {
  const SpanTensors inputs(query, key, value, value.size(3), options);
  auto output = empty_with_layout_of(query, value.size(3));
  for_dtype(query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    forward<T>({inputs.arguments<T>(), mutable_heads<T>(output),
                logsumexp.defined() ? logsumexp.mutable_data_ptr<A>() : nullptr, normalizers<A>(normalizer)},
               output);
  });
  return output;
}

at::Tensor span_attention_without_lse_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           c10::SymInt block_size, c10::SymInt left, c10::SymInt right, bool is_causal,
                                           std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
                                           const std::optional<at::Tensor>& sink,
                                           const std::optional<at::Tensor>& query_start,
                                           const std::optional<at::Tensor>& key_start) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention("span_attention", query, key, value, options);
  check_lengths("span_attention", query, key);
  const c10::cuda::CUDAGuard guard(query.device());
  return span_attention_cuda(query, key, value, options, {}, {});
}

std::tuple<at::Tensor, at::Tensor> span_attention_lse_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, c10::SymInt block_size, c10::SymInt left,
    c10::SymInt right, bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
    const std::optional<at::Tensor>& key_start) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention("span_attention_lse", query, key, value, options);
  check_lengths("span_attention_lse", query, key);
  const c10::cuda::CUDAGuard guard(query.device());
  auto logsumexp = empty_logsumexp(query);
  auto output = span_attention_cuda(query, key, value, options, logsumexp, {});
  return {output, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> span_attention_forward_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, c10::SymInt block_size, c10::SymInt left,
    c10::SymInt right, bool is_causal, std::optional<double> scale, const std::optional<at::Tensor>& key_bias,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& query_start,
    const std::optional<at::Tensor>& key_start) {
  const SpanOptions options{block_size, left, right, is_causal, scale, key_bias, sink, query_start, key_start};
  check_span_attention("_span_attention_forward", query, key, value, options);
  check_lengths("_span_attention_forward", query, key);
  const c10::cuda::CUDAGuard guard(query.device());
  auto logsumexp = empty_logsumexp(query), normalizer = empty_normalizer(query);
  auto output = span_attention_cuda(query, key, value, options, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("span_attention", span_attention_without_lse_cuda);
  m.impl("span_attention_lse", span_attention_lse_cuda);
  m.impl("_span_attention_forward", span_attention_forward_cuda);
}

}  // namespace torchops
