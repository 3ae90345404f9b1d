#include "sparse_attention/score_topk.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "core/library.h"
#include "sparse_attention/cuda/launches.h"

namespace torchops {
namespace {

// Scores that are kept at a time: of so many blocks that they fill a device.
constexpr int64_t most_scores = int64_t{1} << 25;

at::Tensor score_topk_cuda(const at::Tensor& query, const at::Tensor& key, const ScoreTopkOptions& options) {
  const c10::DeviceGuard guard(query.device());
  return score_topk_on_device(
      query, key, options, [&]<typename T>(const kernels::sparse_attention::ScoreChoice<T>& args, int32_t* indices) {
        using A = kernels::accumulate_t<T>;
        const int64_t stride = score_scratch_stride(args), of_block = score_lists(args) * stride;
        const int64_t num_blocks =
            std::clamp<int64_t>(most_scores / std::max<int64_t>(of_block, 1), 1, score_choice_units(args));
        const auto scores = at::empty({num_blocks * of_block},
                                      query.options().dtype(sizeof(A) == sizeof(int64_t) ? at::kLong : at::kInt));
        launch_choose_by_scores(args,
                                {static_cast<kernels::sparse_attention::ordered_score_t<A>*>(scores.mutable_data_ptr()),
                                 stride, num_blocks},
                                indices);
      });
}

}  // namespace

TORCHOPS_LIBRARY_IMPL(CUDA, m) {
  m.impl("score_topk", flattened<score_topk_cuda>);
}

}  // namespace torchops
