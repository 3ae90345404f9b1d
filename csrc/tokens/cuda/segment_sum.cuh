#pragma once

#include "core/cuda/pack.cuh"
#include "tokens/segment_sum.h"

namespace torchops::kernels::tokens {

// A block per group, grid [B * M]; `width` divides C, and all rows are aligned to width elements.
template <int width, typename T>
__global__ void segment_sum(SegmentSum<T> args) {
  using A = accumulate_t<T>;
  const int64_t unit = blockIdx.x;
  const int64_t batch = unit / args.num_groups;
  const int64_t* offsets = args.offsets + batch * (args.num_groups + 1) + unit % args.num_groups;
  const int64_t* begin = args.members + batch * args.num_tokens + offsets[0];
  const int64_t* end = args.members + batch * args.num_tokens + offsets[1];
  const A* weights = args.weight == nullptr ? nullptr : args.weight + batch * args.num_tokens;
  T* output = args.output + unit * args.num_channels;

  auto sum_of_weights = weights == nullptr ? static_cast<double>(end - begin) : 0.0;
  for (const int64_t* token = begin; token != end && weights != nullptr; ++token) {
    sum_of_weights += static_cast<double>(weights[*token]);
  }
  const auto total = static_cast<A>(sum_of_weights);
  if (args.total != nullptr && threadIdx.x == 0) {
    args.total[unit] = total;
  }
  const bool copy = end - begin == 1 && args.is_copy(total);
  const A divisor = args.normalize && total != A(0) ? total : A(1);
  for (int64_t c = int64_t{threadIdx.x} * width; c < args.num_channels; c += int64_t{blockDim.x} * width) {
    if (copy) {
      device::store_pack(output + c, device::load_pack<width>(args.input.row(batch, *begin) + c));
      continue;
    }
    A sum[width] = {};
    for (const int64_t* first = begin; first != end;) {
      const int64_t* last = end - first < members_per_chain ? end : first + members_per_chain;
      A chain[width] = {};
      for (const int64_t* token = first; token != last; ++token) {
        const auto row = device::load_pack<width>(args.input.row(batch, *token) + c);
        const A weight = weights == nullptr ? A(1) : weights[*token];
        for (int e = 0; e < width; ++e) {
          const A product = weight * device::widen(row.element[e]);
          chain[e] = token == first ? product : chain[e] + product;  // 0 + -0 is 0
        }
      }
      for (int e = 0; e < width; ++e) {
        sum[e] = first == begin ? chain[e] : sum[e] + chain[e];
      }
      first = last;
    }
    device::Pack<T, width> result;
    for (int e = 0; e < width; ++e) {
      result.element[e] = device::narrow<T>(sum[e] / divisor);
    }
    device::store_pack(output + c, result);
  }
}

}  // namespace torchops::kernels::tokens
