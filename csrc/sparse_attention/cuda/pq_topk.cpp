#include "sparse_attention/pq_topk.h"

#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "sparse_attention/cuda/code_layout.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

at::Tensor pq_topk_cuda(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options) {
  check_pq_topk("pq_topk", query_codes, key_codes, options);
  const c10::DeviceGuard guard(query_codes.device());
  auto indices = empty_choice(query_codes, options);
  if (indices.numel() == 0) {
    return indices;
  }
  const CodeTensors tensors(query_codes, key_codes, options, codes_in_words);
  const auto args = tensors.arguments(indices.size(3));
  kernels::sparse_attention::launch_choose_by_codes(args, indices.size(0),
                                                    {0, args.num_heads / args.num_kv_heads, 0, args.num_queries},
                                                    indices.mutable_data_ptr<int32_t>(), /*behind=*/-1);
  return indices;
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("pq_topk", flattened<pq_topk_cuda>);
}

}  // namespace torchops
