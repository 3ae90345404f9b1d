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
// Features in shared memory at a time, which is also the longest chain of additions.
inline constexpr int match_depth = 32;
// A stride that spreads neighbouring features of a column over the banks.
inline constexpr int match_stride = match_tile + 1;
inline constexpr int32_t no_similarity = nan_similarity - 1;

// A row divided by `largest` and then by `norm` has length 1.
template <typename A>
struct RowScale {
  A largest;
  A norm;
};

// Computed by a warp. Only a row whose squares leave the safe range is scaled by its largest magnitude;
// a row of zeros stays as it is.
template <typename T, typename A = accumulate_t<T>>
__device__ RowScale<A> row_scale(const T* row, int64_t size) {
  constexpr A too_small = sizeof(A) == sizeof(float) ? A(1e-30) : A(1e-250);
  constexpr A too_large = sizeof(A) == sizeof(float) ? A(1e+30) : A(1e+250);
  const auto sum_of_squares = [&](A divisor) {
    A sum = 0;
    for (int64_t k = device::lane_index(); k < size; k += device::warp_size) {
      const A value = device::widen(row[k]) / divisor;
      sum += value * value;
    }
    for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
      sum += device::shuffle_xor(sum, bits);
    }
    return sum;
  };
  const A plain = sum_of_squares(A(1));
  if (!(plain < too_small || plain > too_large)) {
    return {A(1), std::sqrt(plain)};
  }
  A largest = 0;
  for (int64_t k = device::lane_index(); k < size; k += device::warp_size) {
    const A value = device::widen(row[k]);
    const A magnitude = value < A(0) ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
  }
  for (int bits = device::warp_size / 2; bits > 0; bits /= 2) {
    const A other = device::shuffle_xor(largest, bits);
    largest = other > largest ? other : largest;
  }
  return largest == A(0) ? RowScale<A>{A(1), A(1)} : RowScale<A>{largest, std::sqrt(sum_of_squares(largest))};
}

// Rows of the metric at positions first, first + 2, ... as a tile: their scales, and a part of their
// features, normalised.
template <typename T>
struct MatchRows {
  using A = accumulate_t<T>;

  Rows<const T> metric;
  int64_t num_features;
  int64_t batch;
  int64_t first;
  int64_t count;       // of the tile, at most match_tile
  RowScale<A>* scale;  // [match_tile], shared
  float* features;     // [match_depth, match_stride], shared

  __device__ const T* row(int64_t index) const { return metric.row(batch, first + 2 * index); }

  __device__ void load_scales() const {
    for (int index = device::warp_index(); index < count; index += match_threads / device::warp_size) {
      const auto result = row_scale(row(index), num_features);
      if (device::lane_index() == 0) {
        scale[index] = result;
      }
    }
  }

  __device__ void load_features(int64_t first_feature) const {
    const int64_t feature = first_feature + device::lane_index();
    for (int index = device::warp_index(); index < match_tile; index += match_threads / device::warp_size) {
      float value = 0;
      if (index < count && feature < num_features) {
        value = static_cast<float>(device::widen(row(index)[feature]) / scale[index].largest / scale[index].norm);
      }
      features[device::lane_index() * match_stride + index] = value;
    }
  }
};

template <typename T>
inline constexpr size_t match_shared_bytes = 2 * device::shared_size<RowScale<accumulate_t<T>>>(match_tile) +
                                             2 * device::shared_size<float>(match_depth * match_stride);

// A block of match_threads per row of the batch and tile of sources, grid [B * ceil(S / match_tile)].
template <typename T>
__global__ void best_destination(BestDestination<T> args) {
  using A = accumulate_t<T>;
  device::SharedMemory memory;
  auto* source_scale = memory.take<RowScale<A>>(match_tile);
  auto* destination_scale = memory.take<RowScale<A>>(match_tile);
  auto* source_features = memory.take<float>(match_depth * match_stride);
  auto* destination_features = memory.take<float>(match_depth * match_stride);

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
    float cosine[match_per_thread][match_per_thread] = {};
    for (int64_t feature = 0; feature < args.num_features; feature += match_depth) {
      sources.load_features(feature);
      destinations.load_features(feature);
      device::syncthreads();
      float part[match_per_thread][match_per_thread] = {};
      for (int d = 0; d < match_depth; ++d) {
        for (int i = 0; i < match_per_thread; ++i) {
          const float a = source_features[d * match_stride + row_lane + match_side * i];
          for (int j = 0; j < match_per_thread; ++j) {
            part[i][j] += a * destination_features[d * match_stride + column_lane + match_side * j];
          }
        }
      }
      for (int i = 0; i < match_per_thread; ++i) {
        for (int j = 0; j < match_per_thread; ++j) {
          cosine[i][j] += part[i][j];
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
        const bool is_nan = cosine[i][j] != cosine[i][j];
        const int32_t similarity =
            is_nan ? nan_similarity : static_cast<int32_t>(rintf(cosine[i][j] * similarity_steps));
        // Columns come in ascending order, so that the lowest of equals stays.
        if (similarity > best_similarity[i]) {
          best_similarity[i] = similarity;
          best_column[i] = column;
        }
      }
    }
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
