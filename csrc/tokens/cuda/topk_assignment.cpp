#include "tokens/topk_assignment.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "core/library.h"
#include "core/tensors.h"
#include "tokens/cuda/launches.h"

namespace torchops {
namespace {

at::Tensor topk_assignment_cuda(const at::Tensor& scores, int64_t k, const std::optional<at::Tensor>& padding_mask,
                                int64_t num_protected, bool fuse) {
  check_topk_assignment(scores, k, num_protected, padding_mask);
  const c10::DeviceGuard guard(scores.device());
  const auto batch = scores.size(0), num_tokens = scores.size(1);
  const auto values = scores.contiguous();
  const auto padding = padding_mask ? padding_mask->contiguous() : at::Tensor();
  auto assign = at::empty({batch, num_tokens}, scores.options().dtype(at::kLong));
  for_dtype(scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::TopkAssignment<T> args{static_cast<const T*>(values.const_data_ptr()),
                                                  data_or_null<bool>(padding),
                                                  assign.template mutable_data_ptr<int64_t>(),
                                                  num_tokens,
                                                  num_protected,
                                                  std::min(k, num_tokens - num_protected),
                                                  fuse};
    kernels::tokens::launch_topk_assignment(args, batch);
  });
  return assign;
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("topk_assignment", topk_assignment_cuda);
}

}  // namespace torchops
