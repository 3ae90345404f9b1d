#pragma once

#include "core/cuda/pack.cuh"
#include "tokens/cuda/assigned_group.cuh"
#include "tokens/gather_rows.h"

namespace torchops::kernels::tokens {

// A block per token, grid [B * N]; `width` divides C, and all rows are aligned to width elements.
template <int width, typename T>
__global__ void gather_rows(GatherRows<T> args) {
  using A = accumulate_t<T>;
  const int64_t unit = blockIdx.x;
  const int64_t batch = unit / args.num_tokens;
  const int64_t group = assigned_group(args.assign[unit], args.num_groups);
  const bool kept = group >= 0;
  const T* source = kept ? args.source.row(batch, group) : nullptr;
  const T* residual = args.residual.data == nullptr ? nullptr : args.residual.row(batch, unit % args.num_tokens);
  const A scale = kept ? args.scale(unit, group) : A(0);
  T* output = args.output + unit * args.num_channels;
  for (int64_t c = int64_t{threadIdx.x} * width; c < args.num_channels; c += int64_t{blockDim.x} * width) {
    device::Pack<T, width> result{};
    // What is only moved keeps its bits.
    if (source == nullptr && residual != nullptr) {
      result = device::load_pack<width>(residual + c);
    } else if (source != nullptr) {
      result = device::load_pack<width>(source + c);
      if (residual != nullptr) {
        const auto added = device::load_pack<width>(residual + c);
        for (int e = 0; e < width; ++e) {
          result.element[e] =
              device::narrow<T>(scale * device::widen(result.element[e]) + device::widen(added.element[e]));
        }
      } else if (scale != A(1)) {
        for (int e = 0; e < width; ++e) {
          result.element[e] = device::narrow<T>(scale * device::widen(result.element[e]));
        }
      }
    }
    device::store_pack(output + c, result);
  }
}

}  // namespace torchops::kernels::tokens
