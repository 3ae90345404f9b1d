#include "tokens/bipartite_matching.h"

#include <ATen/ops/empty.h>

#include "core/tensors.h"
#include "tokens/cuda/bipartite_matching.h"
#include "tokens/cuda/launches.h"

namespace torchops {

BestDestinations best_destinations_cuda(const at::Tensor& metric, int64_t r, int64_t num_protected,
                                        const std::optional<at::Tensor>& padding_mask) {
  const auto batch = metric.size(0), num_tokens = metric.size(1);
  const auto features = with_contiguous_rows(metric);
  const int64_t num_sources = kernels::tokens::num_sources(num_tokens, num_protected);
  BestDestinations best{at::empty({batch, num_sources}, metric.options().dtype(at::kInt)),
                        at::empty({batch, num_sources}, metric.options().dtype(at::kLong)),
                        std::nullopt,
                        {}};
  if (padding_mask) {
    best.padding = padding_mask->contiguous();
  }
  const bool* padding = data_or_null<bool>(best.padding);
  best.args = {best.similarity.const_data_ptr<int32_t>(),
               best.destination.const_data_ptr<int64_t>(),
               padding,
               num_tokens,
               num_sources,
               kernels::tokens::first_source(num_protected),
               clamped_r(num_tokens, r, num_protected).expect_int()};
  if (best.args.num_removed == 0) {
    return best;
  }
  for_dtype(metric.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const kernels::tokens::BestDestination<T> args{rows<T>(features),
                                                   padding,
                                                   best.similarity.mutable_data_ptr<int32_t>(),
                                                   best.destination.mutable_data_ptr<int64_t>(),
                                                   num_tokens,
                                                   metric.size(2),
                                                   num_protected,
                                                   num_sources};
    kernels::tokens::launch_best_destination(args, batch);
  });
  return best;
}

}  // namespace torchops
