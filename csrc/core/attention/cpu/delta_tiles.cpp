#include "core/attention/cpu/delta_kernel.h"
#include "core/attention/cpu/uses_tiles.h"

namespace torchops::kernels::attention::TORCHOPS_LEVEL {
namespace {

// 16 rows at a time, by the instruction that sums up dP: of the products of all rows with all rows, those of a row
// with itself.
void row_delta_on_tiles(const RowDelta<bfloat16>& args, int64_t begin, int64_t end) {
  const Sizes& sizes = args.sizes;
  Tiles tiles;
  for (int64_t first = begin; first < end; first += tile_side) {
    const int64_t count = smaller(end - first, tile_side);
    const bfloat16* grads[tile_side] = {};
    const bfloat16* outputs[tile_side] = {};
    for (int64_t row = 0; row < count; ++row) {
      const int64_t query = (first + row) % sizes.num_queries;
      const int64_t head = (first + row) / sizes.num_queries % sizes.num_heads;
      const int64_t batch = (first + row) / sizes.num_queries / sizes.num_heads;
      grads[row] = args.grad_output.row(batch, head, query);
      outputs[row] = args.output.row(batch, head, query);
    }
    tiles.zero<0>();
    for (int64_t d = 0; d < sizes.value_dim; d += tile_depth) {
      vuint grad[tile_side] = {}, output[tile_side] = {};
      for (int64_t row = 0; row < count; ++row) {
        grad[row] = load_elements<bfloat16_pair>(grads[row] + d, sizes.value_dim - d);
        output[row] = load_elements<bfloat16_pair>(outputs[row] + d, sizes.value_dim - d);
      }
      transpose(output);
      tiles.load<1>(grad, 2 * tile_depth);
      tiles.load<2>(output, 2 * tile_depth);
      tiles.multiply_add<0, 1, 2>();
    }
    float sums[tile_side * tile_side];
    tiles.store<0>(sums, 4 * tile_side);
    for (int64_t row = 0; row < count; ++row) {
      const float of_logsumexp = args.grad_logsumexp == nullptr ? 0.0f : args.grad_logsumexp[first + row];
      args.delta[first + row] = sums[row * (tile_side + 1)] - of_logsumexp;
    }
  }
}

}  // namespace

template <typename T>
void row_delta(const RowDelta<T>& args, int64_t begin, int64_t end) {
  if constexpr (is_pair<multiplicand_t<T>>) {
    if (uses_tiles<T>(args.sizes)) {
      return row_delta_on_tiles(args, begin, end);
    }
  }
  avx512_bf16::row_delta(args, begin, end);
}

template <typename A>
void sink_gradient(const SinkGradient<A>& args, int64_t begin, int64_t end) {
  avx512_bf16::sink_gradient(args, begin, end);
}

template void row_delta(const RowDelta<double>&, int64_t, int64_t);
template void row_delta(const RowDelta<float>&, int64_t, int64_t);
template void row_delta(const RowDelta<bfloat16>&, int64_t, int64_t);
template void row_delta(const RowDelta<float16>&, int64_t, int64_t);
template void sink_gradient(const SinkGradient<double>&, int64_t, int64_t);
template void sink_gradient(const SinkGradient<float>&, int64_t, int64_t);

}  // namespace torchops::kernels::attention::TORCHOPS_LEVEL
