#include "sparse_attention/pq_topk.h"

#include <ATen/ops/constant_pad_nd.h>
#include <c10/core/DeviceGuard.h>

#include "core/library.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

// Four codes to a word; those that fill up the last one never agree.
CodeLayout codes_in_words(const at::Tensor& query_codes, const at::Tensor& key_codes) {
  const int64_t behind = (4 - query_codes.size(3) % 4) % 4;
  const auto filled = [&](const at::Tensor& codes, int code) {
    return (behind == 0 ? codes : at::constant_pad_nd(codes, {0, behind}, code)).contiguous();
  };
  return {filled(query_codes, 0), filled(key_codes, 1), query_codes.size(3) + behind, key_codes.size(2)};
}

at::Tensor pq_topk_cuda(const at::Tensor& query_codes, const at::Tensor& key_codes, const PqTopkOptions& options) {
  const c10::DeviceGuard guard(query_codes.device());
  return pq_topk_on_device(query_codes, key_codes, options, codes_in_words,
                           [](const kernels::sparse_attention::CodeChoice& args, int64_t batch) {
                             kernels::sparse_attention::launch_choose_by_codes(args, batch);
                           });
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("pq_topk", flattened<pq_topk_cuda>);
}

}  // namespace torchops
