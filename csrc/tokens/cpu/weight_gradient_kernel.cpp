#include "tokens/cpu/weight_gradient_kernel.h"

#include "core/cpu/simd.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {

template <typename T>
void weight_gradient(const WeightGradient<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.num_tokens;
    const int64_t group = args.assign[unit];
    if (group < 0) {
      args.grad_weight[unit] = 0;
      continue;
    }
    const T* input = args.input.row(batch, unit % args.num_tokens);
    const T* grad = args.grad_merged.row(batch, group);
    const A total = args.total[batch * args.num_groups + group];
    const bool normalized = args.normalize && total != 0;

    vec<A> sum = {};
    if (normalized) {
      const T* merged = args.merged.row(batch, group);
      for_each_vector<T>(args.num_channels, [&](int64_t c, int count) {
        sum += (load_piece(input + c, count) - load_piece(merged + c, count)) * load_piece(grad + c, count);
      });
    } else {
      for_each_vector<T>(args.num_channels, [&](int64_t c, int count) {
        sum += load_piece(input + c, count) * load_piece(grad + c, count);
      });
    }
    args.grad_weight[unit] =
        sum_lanes<A>(sum) / (normalized ? total : A(1)) + args.grad_total[batch * args.num_groups + group];
  }
}

template void weight_gradient(const WeightGradient<double>&, int64_t, int64_t);
template void weight_gradient(const WeightGradient<float>&, int64_t, int64_t);
template void weight_gradient(const WeightGradient<bfloat16>&, int64_t, int64_t);
template void weight_gradient(const WeightGradient<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
