#pragma once

#include "core/cuda/block.cuh"
#include "core/cuda/pack.cuh"
#include "routed_ffn/cuda/rows_of_groups.cuh"
#include "routed_ffn/entries.h"
#include "routed_ffn/slots.h"

namespace torchops::kernels::routed_ffn {

inline constexpr int place_rows_threads = 256;

// A thread for each row. Nobody looked at an order before it came here: an entry out of range stops a debug build, and
// its row has no token in a release build.
static __global__ void place_rows(Placing args) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.num_rows) {
    return;
  }
  const int32_t entry = args.order[row];
  const bool is_entry = 0 <= entry && entry < args.num_rows;
  device::debug_assert(is_entry, "an order's entry is in 0..M-1");
  args.tokens[row] = is_entry ? entry / static_cast<int32_t>(args.num_slots) : -1;
  if (is_entry) {
    args.places[entry] = static_cast<int32_t>(row);
  }
}

// A block for each token, grid [num_tokens]; `width` divides the size. A place that no row was written to, because an
// order names another entry twice, is not followed where it is out of range.
template <int width, typename T>
__global__ void slot_sums(SlotSums<T> args) {
  using A = accumulate_t<T>;
  const int64_t token = blockIdx.x;
  const int32_t end = checked_offset(args.groups, static_cast<int>(args.groups.count));
  const int32_t* const places = args.places + token * args.num_slots;
  const A* const gates = args.gate == nullptr ? nullptr : args.gate + token * args.num_slots;
  for (int64_t c = int64_t{threadIdx.x} * width; c < args.size; c += int64_t{blockDim.x} * width) {
    A sum[width] = {};
    if (args.bias != nullptr) {
      const auto bias = device::load_pack<width>(args.bias + c);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        sum[e] = device::widen(bias.element[e]);
      }
    }
    for (int64_t slot = 0; slot < args.num_slots; ++slot) {
      const int32_t place = places[slot];
      if (place < 0 || place >= end) {
        continue;
      }
      const auto row = device::load_pack<width>(args.rows + place * args.size + c);
      const A gate = gates == nullptr ? A(1) : gates[slot];
#pragma unroll
      for (int e = 0; e < width; ++e) {
        sum[e] += gate * row.element[e];
      }
    }
    device::Pack<T, width> result;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      result.element[e] = device::narrow<T>(sum[e]);
    }
    device::store_pack(args.output + token * args.size + c, result);
  }
}

inline constexpr int slot_dots_warps = 4;

// A warp for each row, grid [num_rows / slot_dots_warps].
template <typename T>
__global__ void slot_dots(SlotDots<T> args) {
  using A = accumulate_t<T>;
  const int64_t row = int64_t{blockIdx.x} * slot_dots_warps + device::warp_index();
  if (row >= checked_offset(args.groups, static_cast<int>(args.groups.count))) {
    return;
  }
  const A* const left = args.rows + row * args.size;
  const T* const right = args.tokens.data + args.tokens.lines[row] * args.tokens.stride;
  A sum = 0;
  for (int64_t c = device::lane_index(); c < args.size; c += device::warp_size) {
    sum += left[c] * device::widen(right[c]);
  }
  sum = device::sum_of_warp(sum);
  if (device::lane_index() == 0) {
    args.dots[args.order[row]] += sum;
  }
}

}  // namespace torchops::kernels::routed_ffn
