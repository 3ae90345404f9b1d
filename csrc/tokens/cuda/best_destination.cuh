#pragma once

#include <cmath>

#include "core/cuda/block.cuh"
#include "tokens/best_destination.h"

namespace torchops::kernels::tokens {

// 256 threads multiply tiles of 64 sources by 64 destinations, 4 x 4 products each.
inline constexpr int match_threads = 256;
inline constexpr int match_tile = 64;
inline constexpr int match_side = 16;
inline constexpr int match_per_thread = match_tile / match_side;
// Features in shared memory at a time.
inline constexpr int match_depth = 32;
// A stride that spreads neighbouring features of a column over the banks.
inline constexpr int match_stride = match_tile + 1;

// How a row becomes integers: q = x * factor * factor as float, times scale, rounded.
template <typename A>
struct IntegerRow {
  A factor;
  float scale;  // 0 for a row of zeros, and one with a NaN or an infinity in it
  float inverse_length;

  __device__ float scaled(A value) const { return static_cast<float>(value * factor * factor); }
  __device__ int32_t integer(A value) const {
    return scale == 0.0F ? 0 : static_cast<int32_t>(rintf(scaled(value) * scale));
  }
};

// Computed by a warp.
template <typename T, typename A = accumulate_t<T>>
__device__ IntegerRow<A> integer_row(const T* row, int64_t size) {
  A largest = 0;
  bool finite = true;
  for (int64_t k = device::lane_index(); k < size; k += device::warp_size) {
    const A value = device::widen(row[k]);
    const A magnitude = value < A(0) ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
    finite = finite && value - value == A(0);
  }
  for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
    const A other = device::shuffle_xor(largest, bits);
    largest = other > largest ? other : largest;
  }
  if (!device::all(finite)) {
    return {A(1), 0.0F, NAN};
  }
  if (largest == A(0)) {
    return {A(1), 0.0F, 0.0F};
  }
  int exponent;
  std::frexp(largest, &exponent);
  IntegerRow<A> result{static_cast<A>(std::ldexp(1.0, half_shift(exponent))), 0.0F, 0.0F};
  int64_t bound = 0;
  for (int64_t k = device::lane_index(); k < size; k += device::warp_size) {
    const auto t = static_cast<int64_t>(rintf(fabsf(result.scaled(device::widen(row[k])))));
    bound += t * (t + 1);
  }
  result.scale = static_cast<float>(integer_scale(static_cast<double>(4 * device::sum_of_warp(bound) + size)));
  int64_t squares = 0;
  for (int64_t k = device::lane_index(); k < size; k += device::warp_size) {
    const int64_t q = result.integer(device::widen(row[k]));
    squares += q * q;
  }
  result.inverse_length = static_cast<float>(1.0 / std::sqrt(static_cast<double>(device::sum_of_warp(squares))));
  return result;
}

// Rows of the metric at positions first, first + 2, ... as a tile: how they become integers, and a part
// of these.
template <typename T>
struct MatchRows {
  using A = accumulate_t<T>;

  Rows<const T> metric;
  int64_t num_features;
  int64_t batch;
  int64_t first;
  int64_t count;         // of the tile, at most match_tile
  IntegerRow<A>* scale;  // [match_tile], shared
  int32_t* features;     // [match_depth, match_stride], shared

  __device__ const T* row(int64_t index) const { return metric.row(batch, first + 2 * index); }

  __device__ void load_scales() const {
    for (int index = device::warp_index(); index < count; index += match_threads / device::warp_size) {
      const auto result = integer_row(row(index), num_features);
      if (device::lane_index() == 0) {
        scale[index] = result;
      }
    }
  }

  __device__ void load_features(int64_t first_feature) const {
    const int64_t feature = first_feature + device::lane_index();
    for (int index = device::warp_index(); index < match_tile; index += match_threads / device::warp_size) {
      int32_t value = 0;
      if (index < count && feature < num_features) {
        value = scale[index].integer(device::widen(row(index)[feature]));
      }
      features[device::lane_index() * match_stride + index] = value;
    }
  }
};

template <typename T>
inline constexpr size_t match_shared_bytes = 2 * device::shared_size<IntegerRow<accumulate_t<T>>>(match_tile) +
                                             2 * device::shared_size<int32_t>(match_depth * match_stride);

// A block of match_threads per row of the batch and tile of sources, grid [B * ceil(S / match_tile)].
template <typename T>
__global__ void best_destination(BestDestination<T> args) {
  using A = accumulate_t<T>;
  device::SharedMemory memory;
  auto* source_scale = memory.take<IntegerRow<A>>(match_tile);
  auto* destination_scale = memory.take<IntegerRow<A>>(match_tile);
  auto* source_features = memory.take<int32_t>(match_depth * match_stride);
  auto* destination_features = memory.take<int32_t>(match_depth * match_stride);

  const int64_t tiles = (args.num_sources + match_tile - 1) / match_tile;
  const int64_t batch = blockIdx.x / tiles;
  const int64_t first_source = blockIdx.x % tiles * match_tile;
  const int64_t num_destinations = (args.num_tokens - args.first_destination() + 1) / 2;
  const auto rest = [](int64_t all, int64_t first) { return all - first < match_tile ? all - first : match_tile; };
  const bool* padding = args.padding == nullptr ? nullptr : args.padding + batch * args.num_tokens;
  const int column_lane = static_cast<int>(threadIdx.x) % match_side;
  const int row_lane = static_cast<int>(threadIdx.x) / match_side;

  const MatchRows<T> sources{args.metric,
                             args.num_features,
                             batch,
                             args.first_source() + 2 * first_source,
                             rest(args.num_sources, first_source),
                             source_scale,
                             source_features};
  sources.load_scales();

  int32_t best_similarity[match_per_thread];
  int64_t best_column[match_per_thread];
  for (int i = 0; i < match_per_thread; ++i) {
    best_similarity[i] = no_similarity;
    best_column[i] = num_destinations;
  }
  for (int64_t first = 0; first < num_destinations; first += match_tile) {
    const MatchRows<T> destinations{args.metric,
                                    args.num_features,
                                    batch,
                                    args.first_destination() + 2 * first,
                                    rest(num_destinations, first),
                                    destination_scale,
                                    destination_features};
    destinations.load_scales();
    device::syncthreads();
    int32_t product[match_per_thread][match_per_thread] = {};
    for (int64_t feature = 0; feature < args.num_features; feature += match_depth) {
      sources.load_features(feature);
      destinations.load_features(feature);
      device::syncthreads();
      for (int d = 0; d < match_depth; ++d) {
        for (int i = 0; i < match_per_thread; ++i) {
          const int32_t a = source_features[d * match_stride + row_lane + match_side * i];
          for (int j = 0; j < match_per_thread; ++j) {
            product[i][j] += a * destination_features[d * match_stride + column_lane + match_side * j];
          }
        }
      }
      device::syncthreads();
    }
    for (int j = 0; j < match_per_thread; ++j) {
      const int64_t column = first + column_lane + match_side * j;
      if (column >= num_destinations || (padding != nullptr && padding[args.first_destination() + 2 * column])) {
        continue;
      }
      for (int i = 0; i < match_per_thread; ++i) {
        const float cosine = static_cast<float>(product[i][j]) *
                             source_scale[row_lane + match_side * i].inverse_length *
                             destination_scale[column_lane + match_side * j].inverse_length;
        const int32_t similarity =
            cosine != cosine ? nan_similarity : static_cast<int32_t>(rintf(cosine * similarity_steps));
        // Columns come in ascending order, so that the lowest of equals stays.
        if (similarity > best_similarity[i]) {
          best_similarity[i] = similarity;
          best_column[i] = column;
        }
      }
    }
    device::syncthreads();
  }

  for (int i = 0; i < match_per_thread; ++i) {
    for (int bits = match_side / 2; bits > 0; bits /= 2) {
      const int32_t similarity = device::shuffle_xor(best_similarity[i], bits);
      const int64_t column = device::shuffle_xor(best_column[i], bits);
      if (similarity > best_similarity[i] || (similarity == best_similarity[i] && column < best_column[i])) {
        best_similarity[i] = similarity;
        best_column[i] = column;
      }
    }
    const int64_t source = first_source + row_lane + match_side * i;
    if (column_lane == 0 && source < args.num_sources) {
      const bool found =
          best_similarity[i] > no_similarity && !(padding != nullptr && padding[args.first_source() + 2 * source]);
      args.similarity[batch * args.num_sources + source] = best_similarity[i];
      args.destination[batch * args.num_sources + source] =
          found ? args.first_destination() + 2 * best_column[i] : int64_t{-1};
    }
  }
}

}  // namespace torchops::kernels::tokens
