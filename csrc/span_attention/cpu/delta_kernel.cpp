#include "span_attention/cpu/delta_kernel.h"

#include "core/cpu/exponential.h"
#include "core/cpu/simd.h"

namespace torchops::kernels::span_attention::TORCHOPS_LEVEL {

template <typename T>
void row_delta(const RowDelta<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Sizes& sizes = args.sizes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t query = unit % sizes.num_queries;
    const int64_t head = unit / sizes.num_queries % sizes.num_heads;
    const int64_t batch = unit / sizes.num_queries / sizes.num_heads;
    const T* const grad = args.grad_output.row(batch, head, query);
    const T* const output = args.output.row(batch, head, query);
    vec<A> sum = {};
    for_each_vector<T>(sizes.value_dim, [&](int64_t d, int lanes_used) {
      sum += load_piece(grad + d, lanes_used) * load_piece(output + d, lanes_used);
    });
    args.delta[unit] = sum_lanes<A>(sum) - (args.grad_logsumexp == nullptr ? A(0) : args.grad_logsumexp[unit]);
  }
}

template <typename A>
void sink_gradient(const SinkGradient<A>& args, int64_t begin, int64_t end) {
  const Sizes& sizes = args.sizes;
  for (int64_t head = begin; head < end; ++head) {
    vec<A> sum = {};
    for (int64_t batch = 0; batch < sizes.batch; ++batch) {
      const int64_t first = (batch * sizes.num_heads + head) * sizes.num_queries;
      for_each_vector<A>(sizes.num_queries, [&](int64_t query, int lanes_used) {
        const vec<A> logsumexp = load_piece(args.logsumexp + first + query, lanes_used);
        const vec<A> exponent = (args.sink[head] - logsumexp) * log2_e<A>;
        const vec<A> probability = exp2(exponent > A(0) ? vec<A>{} : exponent);
        const vec<A> product = probability * load_piece(args.delta + first + query, lanes_used);
        // Lanes behind the last query have a delta of 0; a row of nothing has no sink that counts.
        sum -= logsumexp == -static_cast<A>(__builtin_inf()) ? vec<A>{} : product;
      });
    }
    args.grad_sink[head] = sum_lanes<A>(sum);
  }
}

template void row_delta(const RowDelta<double>&, int64_t, int64_t);
template void row_delta(const RowDelta<float>&, int64_t, int64_t);
template void row_delta(const RowDelta<bfloat16>&, int64_t, int64_t);
template void row_delta(const RowDelta<float16>&, int64_t, int64_t);
template void sink_gradient(const SinkGradient<double>&, int64_t, int64_t);
template void sink_gradient(const SinkGradient<float>&, int64_t, int64_t);

}  // namespace torchops::kernels::span_attention::TORCHOPS_LEVEL
