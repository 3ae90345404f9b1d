#pragma once

#include "core/attention/cuda/softmax.cuh"
#include "core/cuda/block.cuh"
#include "sparse_attention/cuda/sorted_lists.cuh"

// What a warp computes with rows that lie apart, 32 at a time: they are gathered into shared memory, a slice of columns
// after the other. Every lane of the warp calls these functions at one place.

namespace torchops::kernels::sparse_attention {

inline constexpr int num_warps = 4;
inline constexpr int num_threads = num_warps * device::warp_size;
inline constexpr int slice_columns = 2 * device::warp_size;
inline constexpr int most_slices = 4;
inline constexpr int most_columns = most_slices * slice_columns;
inline constexpr int tile_stride = slice_columns + 1;  // a lane for each row reads without conflicts

// A warp's part of the shared memory.
template <typename A>
struct WarpMemory {
  A* tile;             // [32][slice_columns], rows tile_stride apart
  A* row;              // [most_columns]
  A* other_row;        // [most_columns]
  A* weights;          // [32]
  int* numbers;        // [32], of rows; -1 for none
  int* pending;        // [64]
  int* pending_entry;  // [64]

  static constexpr size_t bytes = device::shared_size<A>(num_warps * device::warp_size * tile_stride) +
                                  2 * device::shared_size<A>(num_warps * most_columns) +
                                  device::shared_size<A>(num_threads) + device::shared_size<int>(num_threads) +
                                  2 * device::shared_size<int>(2 * num_threads);

  __device__ WarpMemory() {
    device::SharedMemory memory;
    const int warp = device::warp_index();
    tile = memory.take<A>(num_warps * device::warp_size * tile_stride) + warp * device::warp_size * tile_stride;
    row = memory.take<A>(num_warps * most_columns) + warp * most_columns;
    other_row = memory.take<A>(num_warps * most_columns) + warp * most_columns;
    weights = memory.take<A>(num_threads) + warp * device::warp_size;
    numbers = memory.take<int>(num_threads) + warp * device::warp_size;
    pending = memory.take<int>(2 * num_threads) + warp * 2 * device::warp_size;
    pending_entry = memory.take<int>(2 * num_threads) + warp * 2 * device::warp_size;
  }
};

// Rows [L, size] of one head.
template <typename T>
struct RowsOfHead {
  const T* data;
  int64_t stride;
  int size;

  __device__ RowsOfHead(const Heads<const T>& heads, int64_t batch, int64_t head, int64_t size)
      : data(heads.data == nullptr ? nullptr : heads.row(batch, head, 0)),
        stride(heads.row_stride),
        size(static_cast<int>(size)) {}
};

// What was written before can be read behind the next gather.
template <typename T, typename A>
__device__ __forceinline__ void load_row(A* to, const RowsOfHead<T>& rows, int64_t number) {
  for (int column = device::lane_index(); column < rows.size; column += device::warp_size) {
    to[column] = device::widen(rows.data[number * rows.stride + column]);
  }
}

// Columns [first, first + slice_columns) of the rows that memory.numbers names, and zeros for the others.
template <typename T, typename A>
__device__ void gather(const WarpMemory<A>& memory, const RowsOfHead<T>& rows, int first) {
  device::syncwarp();
  for (int row = 0; row < device::warp_size; ++row) {
    const int number = memory.numbers[row];
#pragma unroll
    for (int part = 0; part < slice_columns; part += device::warp_size) {
      const int column = part + device::lane_index();
      memory.tile[row * tile_stride + column] = number >= 0 && first + column < rows.size
                                                    ? device::widen(rows.data[number * rows.stride + first + column])
                                                    : A(0);
    }
  }
  device::syncwarp();
}

// The product of `row`, in shared memory, with the row of this lane, added up from the first column to the last.
template <typename T, typename A>
__device__ A product_with_rows(const WarpMemory<A>& memory, const A* row, const RowsOfHead<T>& rows) {
  A sum = 0;
  for (int first = 0; first < rows.size; first += slice_columns) {
    gather(memory, rows, first);
    const int columns = rows.size - first < slice_columns ? rows.size - first : slice_columns;
    for (int column = 0; column < columns; ++column) {
      sum += row[first + column] * memory.tile[device::lane_index() * tile_stride + column];
    }
  }
  return sum;
}

// Sums of rows: a lane has columns lane, lane + 32, ...
template <typename A>
struct RowSums {
  A part[most_slices][2] = {};

  __device__ __forceinline__ void rescale(A factor) {
#pragma unroll
    for (auto& slice : part) {
      slice[0] *= factor;
      slice[1] *= factor;
    }
  }

  // Adds the rows that the first `count` of memory.numbers name, times memory.weights, in this order.
  template <typename T>
  __device__ void add(const WarpMemory<A>& memory, const RowsOfHead<T>& rows, int count = device::warp_size) {
#pragma unroll
    for (int s = 0; s < most_slices; ++s) {
      if (s * slice_columns < rows.size) {
        gather(memory, rows, s * slice_columns);
        for (int row = 0; row < count; ++row) {
          const A* from = memory.tile + row * tile_stride + device::lane_index();
          part[s][0] += memory.weights[row] * from[0];
          part[s][1] += memory.weights[row] * from[device::warp_size];
        }
      }
    }
  }

  // What store wrote with a factor of 1.
  __device__ void load(const A* from, int64_t size) {
#pragma unroll
    for (int s = 0; s < most_slices; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = s * slice_columns + half * device::warp_size + device::lane_index();
        part[s][half] = column < size ? from[column] : A(0);
      }
    }
  }

  template <typename T>
  __device__ void store(T* to, int64_t size, A factor) const {
#pragma unroll
    for (int s = 0; s < most_slices; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = s * slice_columns + half * device::warp_size + device::lane_index();
        if (column < size) {
          to[column] = device::narrow<T>(part[s][half] * factor);
        }
      }
    }
  }
};

template <typename A>
__device__ __forceinline__ A bias_of(const A* key_bias, int64_t key, const A* pair_bias, int64_t place) {
  return (key_bias == nullptr ? A(0) : key_bias[key]) + (pair_bias == nullptr ? A(0) : pair_bias[place]);
}

// The keys of a list that a query sees, 32 at a time.
template <typename T>
struct ListWalk {
  const Attention<T>& inputs;
  Sequence sequence;
  const int32_t* begins;
  const int32_t* places;
  int64_t end_of_keys;
  int entry = 0;
  int64_t done = 0;  // keys of the entry

  // A lane's key, -1 for none, and the place of its entry in the caller's list; false where there are no more.
  __device__ bool next(int& key, int& place) {
    const int count = static_cast<int>(inputs.lists.num_listed);
    if (entry >= count || begins[entry] >= end_of_keys) {
      return false;
    }
    if (inputs.rule.block_size == 1) {
      const int own = entry + device::lane_index();
      key = own < count && begins[own] < end_of_keys ? begins[own] : -1;
      place = own < count && places != nullptr ? places[own] : 0;
      entry += device::warp_size;
      return true;
    }
    const int64_t end = end_of_block(inputs.rule, sequence, begins[entry]);
    const int64_t last = end < end_of_keys ? end : end_of_keys;
    const int64_t own = begins[entry] + done + device::lane_index();
    key = own < last ? static_cast<int>(own) : -1;
    place = places[entry];
    done += device::warp_size;
    if (begins[entry] + done >= last) {
      ++entry;
      done = 0;
    }
    return true;
  }
};

}  // namespace torchops::kernels::sparse_attention
