#include "tokens/cpu/segment_sum_kernel.h"

#include "core/cpu/simd.h"

namespace torchops::kernels::tokens::TORCHOPS_LEVEL {

template <typename T>
void segment_sum(const SegmentSum<T>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t channels = args.num_channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t batch = unit / args.num_groups;
    const int64_t group = unit % args.num_groups;
    const int64_t* offsets = args.offsets + batch * (args.num_groups + 1);
    const int64_t* members = args.members + batch * args.num_tokens;
    const A* weights = args.weight == nullptr ? nullptr : args.weight + batch * args.num_tokens;
    const int64_t first = offsets[group];
    const int64_t last = offsets[group + 1];
    const auto weight_of = [&](int64_t position) { return weights == nullptr ? A(1) : weights[members[position]]; };
    T* output = args.output + unit * channels;

    A total = 0;
    for (int64_t position = first; position < last; ++position) {
      total += weight_of(position);
    }
    if (args.total != nullptr) {
      args.total[unit] = total;
    }
    const bool single = last - first == 1;
    if (first == last) {
      __builtin_memset(output, 0, static_cast<size_t>(channels) * sizeof(T));
    } else if (single && (args.normalize ? total != 0 : total == 1)) {
      copy_row(output, args.input.row(batch, members[first]), channels);
    } else {
      const A divisor = args.normalize && total != 0 ? total : A(1);
      for_each_vector<T>(channels, [&](int64_t c, int count) {
        vec<A> sum = weight_of(first) * load_piece(args.input.row(batch, members[first]) + c, count);
        for (int64_t position = first + 1; position < last; ++position) {
          sum += weight_of(position) * load_piece(args.input.row(batch, members[position]) + c, count);
        }
        store_piece(output + c, sum / divisor, count);
      });
    }
  }
}

template void segment_sum(const SegmentSum<double>&, int64_t, int64_t);
template void segment_sum(const SegmentSum<float>&, int64_t, int64_t);
template void segment_sum(const SegmentSum<bfloat16>&, int64_t, int64_t);
template void segment_sum(const SegmentSum<float16>&, int64_t, int64_t);

}  // namespace torchops::kernels::tokens::TORCHOPS_LEVEL
