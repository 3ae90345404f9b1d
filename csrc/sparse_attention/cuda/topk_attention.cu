#include <torch/library.h>

#include "sparse_attention/arguments.h"
#include "sparse_attention/cuda/sorted_lists.h"

namespace torchops {
namespace {

at::Tensor forward(const TopkInputs& inputs, const at::Tensor& logsumexp, const at::Tensor& normalizer) {
  auto output = empty_with_layout_of(inputs.query, inputs.value.size(3));
  if (output.numel() == 0) {
    return output;
  }
  const TopkTensors tensors(inputs, inputs.value.size(3));
  for_dtype(inputs.query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = kernels::accumulate_t<T>;
    const auto arguments = tensors.arguments<T>();
    const SortedListsOnDevice sorted(arguments, inputs.query.options());
    kernels::sparse_attention::launch_forward<T>(
        {arguments, mutable_heads<T>(output), logsumexp.defined() ? logsumexp.mutable_data_ptr<A>() : nullptr,
         normalizers<A>(normalizer)},
        sorted.lists());
  });
  return output;
}

at::Tensor topk_attention_cuda(const TopkInputs& inputs) {
  check_topk_attention("topk_attention", inputs);
  const c10::cuda::CUDAGuard guard(inputs.query.device());
  return forward(inputs, {}, {});
}

std::tuple<at::Tensor, at::Tensor> topk_attention_lse_cuda(const TopkInputs& inputs) {
  check_topk_attention("topk_attention_lse", inputs);
  const c10::cuda::CUDAGuard guard(inputs.query.device());
  auto logsumexp = empty_logsumexp(inputs.query);
  auto output = forward(inputs, logsumexp, {});
  return {output, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_attention_forward_cuda(const TopkInputs& inputs) {
  check_topk_attention("_topk_attention_forward", inputs);
  const c10::cuda::CUDAGuard guard(inputs.query.device());
  auto logsumexp = empty_logsumexp(inputs.query), normalizer = empty_normalizer(inputs.query);
  auto output = forward(inputs, logsumexp, normalizer);
  return {output, logsumexp, normalizer};
}

}  // namespace

TORCH_LIBRARY_IMPL(torchops, CUDA, m) {
  m.impl("topk_attention", boundary<topk_attention_cuda>);
  m.impl("topk_attention_lse", boundary<topk_attention_lse_cuda>);
  m.impl("_topk_attention_forward", boundary<topk_attention_forward_cuda>);
}

}  // namespace torchops
