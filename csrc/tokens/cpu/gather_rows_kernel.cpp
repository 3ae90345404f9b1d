#include "tokens/cpu/gather_rows_kernel.h"

#include "core/cpu/simd.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {

template <typename T>
void gather_rows(const GatherRows<T>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.num_channels;
  const size_t row_bytes = static_cast<size_t>(channels) * sizeof(T);
  if (channels == 0) {
    return;  // rows of nothing may have no address
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.num_tokens;
    const int64_t token = unit % args.num_tokens;
    const int64_t group = args.assign[unit];
    T* output = args.output + unit * channels;
    const T* source = group < 0 ? nullptr : args.source.row(batch, group);
    const T* residual = args.residual.data == nullptr ? nullptr : args.residual.row(batch, token);
    const auto scale = group < 0 ? accumulate_t<T>(0) : args.scale(unit, group);

    if (source == nullptr && residual == nullptr) {
      __builtin_memset(output, 0, row_bytes);
    } else if (source == nullptr) {
      copy_row(output, residual, channels);
    } else if (residual != nullptr) {
      for_each_vector<T>(channels, [&](int64_t c, int count) {
        store_piece(output + c, scale * load_piece(source + c, count) + load_piece(residual + c, count), count);
      });
    } else if (scale == 1) {
      copy_row(output, source, channels);
    } else {
      for_each_vector<T>(channels, [&](int64_t c, int count) {
        store_piece(output + c, scale * load_piece(source + c, count), count);
      });
    }
  }
}

template void gather_rows(const GatherRows<double>&, int64_t, int64_t);
template void gather_rows(const GatherRows<float>&, int64_t, int64_t);
template void gather_rows(const GatherRows<bfloat16>&, int64_t, int64_t);
template void gather_rows(const GatherRows<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
