#include "tokens/cpu/weight_gradient_kernel.h"

#include "core/cpu/simd.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {

namespace {

template <typename T>
accumulate_t<T> product(const T* row, const T* grad, int64_t channels) {
  vec<accumulate_t<T>> sum = {};
  for_each_vector<T>(channels,
                     [&](int64_t c, int count) { sum += load_piece(row + c, count) * load_piece(grad + c, count); });
  return sum_lanes<accumulate_t<T>>(sum);
}

template <typename T>
accumulate_t<T> product_of_difference(const T* row, const T* first, const T* grad, int64_t channels) {
  vec<accumulate_t<T>> sum = {};
  for_each_vector<T>(channels, [&](int64_t c, int count) {
    const auto subtracted = load_piece(first + c, count);
    // An infinity of the first member stays its own.
    const auto finite = subtracted - subtracted == 0 ? subtracted : vec<accumulate_t<T>>{};
    sum += (load_piece(row + c, count) - finite) * load_piece(grad + c, count);
  });
  return sum_lanes<accumulate_t<T>>(sum);
}

}  // namespace

template <typename T>
void weight_gradient(const WeightGradient<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.num_groups;
    const int64_t group = unit % args.num_groups;
    const int64_t* const offsets = args.offsets + batch * (args.num_groups + 1) + group;
    const int64_t* const first = args.members + batch * args.num_tokens + offsets[0];
    const int64_t* const last = args.members + batch * args.num_tokens + offsets[1];
    A* const grad_weight = args.grad_weight + batch * args.num_tokens;
    const bool normalized = args.normalized(unit);
    const A grad_total = args.grad_total == nullptr ? A(0) : args.grad_total[unit];

    double sum = 0;
    for (const int64_t* token = first; token != last; ++token) {
      A d = 0;
      if (args.num_channels > 0) {  // rows of nothing may have no address
        const T* const row = args.input.row(batch, *token);
        const T* const grad = args.grad_merged.row(batch, group);
        d = normalized ? product_of_difference(row, args.input.row(batch, *first), grad, args.num_channels)
                       : product(row, grad, args.num_channels);
      }
      grad_weight[*token] = d;
      sum += static_cast<double>(args.weight_of(batch, *token)) * static_cast<double>(d);
    }
    const A divisor = normalized ? args.total[unit] : A(1);
    const A mean = normalized ? static_cast<A>(sum / static_cast<double>(divisor)) : A(0);
    for (const int64_t* token = first; token != last; ++token) {
      grad_weight[*token] = (grad_weight[*token] - mean) / divisor + grad_total;
    }
  }
}

template void weight_gradient(const WeightGradient<double>&, int64_t, int64_t);
template void weight_gradient(const WeightGradient<float>&, int64_t, int64_t);
template void weight_gradient(const WeightGradient<bfloat16>&, int64_t, int64_t);
template void weight_gradient(const WeightGradient<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
