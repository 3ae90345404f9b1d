#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/pack.cuh"
#include "routed_ffn/cuda/activation.cuh"
#include "routed_ffn/cuda/rows_of_groups.cuh"

namespace torchops::kernels::routed_ffn {

// Neighbouring hidden units of a row: their preactivations, or their gates and values.
template <typename N, int width>
struct Units {
  device::Pack<N, width> first, second;  // second of gated units only

  __device__ __forceinline__ static Units load(const N* row, const Activation& activation, int64_t size, int64_t unit) {
    switch (activation.units) {
      case GatedUnits::none:
        return {device::load_pack<width>(row + unit), {}};
      case GatedUnits::side_by_side:
        return {device::load_pack<width>(row + unit), device::load_pack<width>(row + size + unit)};
      case GatedUnits::interleaved:
        break;
    }
    const auto low = device::load_pack<width>(row + 2 * unit), high = device::load_pack<width>(row + 2 * unit + width);
    Units units;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      units.first.element[e] = 2 * e < width ? low.element[2 * e] : high.element[2 * e - width];
      units.second.element[e] = 2 * e + 1 < width ? low.element[2 * e + 1] : high.element[2 * e + 1 - width];
    }
    return units;
  }

  __device__ __forceinline__ void store(N* row, const Activation& activation, int64_t size, int64_t unit) const {
    switch (activation.units) {
      case GatedUnits::none:
        device::store_pack(row + unit, first);
        return;
      case GatedUnits::side_by_side:
        device::store_pack(row + unit, first);
        device::store_pack(row + size + unit, second);
        return;
      case GatedUnits::interleaved:
        break;
    }
    device::Pack<N, width> low, high;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      (2 * e < width ? low.element[2 * e] : high.element[2 * e - width]) = first.element[e];
      (2 * e + 1 < width ? low.element[2 * e + 1] : high.element[2 * e + 1 - width]) = second.element[e];
    }
    device::store_pack(row + 2 * unit, low);
    device::store_pack(row + 2 * unit + width, high);
  }
};

// A block for each row, grid [num_rows]; `width` divides the size, and rows are aligned to width elements.
template <int width, typename T>
__global__ void activate(Activate<T> args) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x, preactivations = args.activation.preactivations(args.size);
  const bool is_in_group = row < checked_offset(args.groups, static_cast<int>(args.groups.count));
  const bool is_gated = args.activation.units != GatedUnits::none;
  if (args.wide_preactivation == nullptr && !is_in_group) {
    return;
  }
  T* const preactivation = args.preactivation + row * preactivations;
  T* const hidden = args.hidden + row * args.hidden_stride;
  for (int64_t first = 0; first < args.size; first += int64_t{blockDim.x} * width) {
    const int64_t unit = first + int64_t{threadIdx.x} * width;
    const bool has_unit = unit < args.size;
    Units<T, width> units{};
    if (has_unit && args.wide_preactivation != nullptr) {
      const auto wide =
          Units<A, width>::load(args.wide_preactivation + row * preactivations, args.activation, args.size, unit);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        units.first.element[e] = device::narrow<T>(wide.first.element[e]);
        units.second.element[e] = is_gated ? device::narrow<T>(wide.second.element[e]) : T{};
      }
      units.store(preactivation, args.activation, args.size, unit);
    } else if (has_unit) {
      units = Units<T, width>::load(preactivation, args.activation, args.size, unit);
    }
    // Where hidden takes the place of interleaved preactivations, those of a thread's units are not where its results
    // go, but where another's do, or the same one's before.
    if (args.activation.units == GatedUnits::interleaved) {
      device::syncthreads();
    }
    if (has_unit && is_in_group) {
      device::Pack<T, width> result;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const A x = device::widen(units.first.element[e]);
        result.element[e] =
            device::narrow<T>(is_gated ? gated_unit(args.activation, x, A(device::widen(units.second.element[e]))).value
                                       : activation_of(args.activation, x).value);
      }
      device::store_pack(hidden + unit, result);
    }
  }
}

inline constexpr int activation_warps = 4;
inline constexpr int activation_threads = activation_warps * device::warp_size;

// A warp for each row, grid [num_rows / activation_warps]; width as in activate.
template <int width, typename T>
__global__ void __launch_bounds__(activation_threads) activate_backward(ActivateBackward<T> args) {
  using A = accumulate_t<T>;
  const int64_t row = int64_t{blockIdx.x} * activation_warps + device::warp_index();
  if (row >= checked_offset(args.groups, static_cast<int>(args.groups.count))) {
    return;
  }
  const int64_t preactivations = args.activation.preactivations(args.size), begin = row * args.size;
  const bool is_gated = args.activation.units != GatedUnits::none;
  const int32_t entry = args.order[row];
  const A scale = args.scale == nullptr ? A(1) : args.scale[entry];
  A dot = 0;
  for (int64_t unit = int64_t{device::lane_index()} * width; unit < args.size; unit += device::warp_size * width) {
    const auto units =
        Units<T, width>::load(args.preactivation + row * preactivations, args.activation, args.size, unit);
    device::Pack<A, width> to_output, plain{};
    if (args.wide_output_gradient != nullptr) {
      to_output = device::load_pack<width>(args.wide_output_gradient + begin + unit);
    } else {
      const auto rounded = device::load_pack<width>(args.output_gradient + begin + unit);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        to_output.element[e] = device::widen(rounded.element[e]);
      }
    }
    if (args.plain_gradient != nullptr) {
      plain = device::load_pack<width>(args.plain_gradient + begin + unit);
    }
    Units<T, width> gradient{};
    device::Pack<T, width> hidden;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const A x = device::widen(units.first.element[e]);
      const A to_hidden = scale * to_output.element[e] + plain.element[e];
      A value;
      if (is_gated) {
        const auto unit_of = gated_unit(args.activation, x, A(device::widen(units.second.element[e])));
        value = unit_of.value;
        gradient.first.element[e] = device::narrow<T>(unit_of.gate_derivative * to_hidden);
        gradient.second.element[e] = device::narrow<T>(unit_of.up_derivative * to_hidden);
      } else {
        const auto slope = activation_of(args.activation, x);
        value = slope.value;
        gradient.first.element[e] = device::narrow<T>(slope.derivative * to_hidden);
      }
      hidden.element[e] = device::narrow<T>(scale * value);
      dot += value * to_output.element[e];
    }
    if (args.grad_preactivation != nullptr) {
      gradient.store(args.grad_preactivation + row * preactivations, args.activation, args.size, unit);
    }
    if (args.hidden != nullptr) {
      device::store_pack(args.hidden + begin + unit, hidden);
    }
  }
  dot = device::sum_of_warp(dot);
  if (args.dots != nullptr && device::lane_index() == 0) {
    args.dots[entry] += dot;
  }
}

}  // namespace torchops::kernels::routed_ffn
