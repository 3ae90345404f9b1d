#include "core/attention/cpu/delta_kernel.h"

#include "core/cpu/elements.h"
#include "core/cpu/exponential.h"

namespace torchops::kernels::attention::TORCHOPS_LEVEL {

// As many rows at a time as a vector has lanes: along the row, element by element, as products of matrices add up.
template <typename T>
void row_delta(const RowDelta<T>& args, int64_t begin, int64_t end) {
  using E = multiplicand_t<T>;
  using A = accumulate_t<T>;
  constexpr int64_t side = lane_count<E>;
  const Sizes& sizes = args.sizes;
  const int64_t depth = depth_of<E>(sizes.value_dim);
  for (int64_t first = begin; first < end; first += side) {
    const int64_t count = end - first < side ? end - first : side;
    const T* grads[side];
    const T* outputs[side];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t query = (first + row) % sizes.num_queries;
      const int64_t head = (first + row) / sizes.num_queries % sizes.num_heads;
      const int64_t batch = (first + row) / sizes.num_queries / sizes.num_heads;
      grads[row] = args.grad_output.row(batch, head, query);
      outputs[row] = args.output.row(batch, head, query);
    }
    vec<A> sum = {};
    for (int64_t d = 0; d < depth; d += side) {
      const int64_t at = d * element<E>::depth;
      typename element<E>::vector grad[side] = {}, output[side] = {};
      for (int64_t row = 0; row < count; ++row) {
        grad[row] = load_elements<E>(grads[row] + at, sizes.value_dim - at);
        output[row] = load_elements<E>(outputs[row] + at, sizes.value_dim - at);
      }
      transpose(grad);
      transpose(output);
      for (int64_t e = 0; e < side && d + e < depth; ++e) {
        sum = multiply_add_lanes(grad[e], output[e], sum);
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      const A of_logsumexp = args.grad_logsumexp == nullptr ? A(0) : args.grad_logsumexp[first + row];
      args.delta[first + row] = sum[row] - of_logsumexp;
    }
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
        vec<A> largest = {}, inverse_sum = {};  // lanes behind the last query have no probability
        for (int lane = 0; lane < lanes_used; ++lane) {
          largest[lane] = args.normalizer[first + query + lane].largest;
          inverse_sum[lane] = args.normalizer[first + query + lane].inverse_sum;
        }
        const vec<A> distance = args.sink[head] - largest;
        const vec<A> probability = exp(distance > A(0) ? vec<A>{} : distance) * inverse_sum;
        const vec<A> product = probability * load_piece(args.delta + first + query, lanes_used);
        sum -= probability == A(0) ? vec<A>{} : product;
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

}  // namespace torchops::kernels::attention::TORCHOPS_LEVEL
