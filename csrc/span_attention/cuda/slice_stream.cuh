#pragma once

#include "core/cuda/fma_tile.cuh"

namespace torchops::kernels::span_attention {

// Rows of queries and of keys in a tile of a kernel whose threads accumulate so many slices of rows: a thread has
// 4 x 4 of the pairs, or 2 x 2 where its registers do not hold more.
template <typename T, int accumulated_slices>
inline constexpr int fma_rows_per_thread = sizeof(T) == 4 && accumulated_slices <= 4 ? 4 : 2;
template <typename T, int accumulated_slices>
inline constexpr int fma_tile = device::fma_side * fma_rows_per_thread<T, accumulated_slices>;

// Slices that rows of so many elements are cut into.
constexpr int num_slices(int64_t size) {
  return static_cast<int>((size + device::slice - 1) / device::slice);
}

// Starts to copy the s-th slice of rows first, first + 1, ... of a tile; zeros stand for rows from `end` on.
template <int tile, typename T>
__device__ __forceinline__ void copy_slice_async(T* to, const device::MatrixRows<const T>& from, int s, int first,
                                                 int end, bool wide) {
  const device::MatrixRows<const T> part{from.data + s * device::slice, from.row_stride, from.size - s * device::slice};
  device::copy_tile_async<tile, device::slice, device::fma_threads>(to, part, first, end, wide);
}

template <typename T, int tile>
inline constexpr size_t slice_stream_bytes = 4 * device::tile_bytes<T, tile, device::slice>;

// Slices on their way through two pairs of buffers: while a block multiplies one pair, the next is copied.
// Each call of copy(first, second) starts the copies of one step, or none behind the last.
template <typename T, int tile, typename Copy>
class SliceStream {
 public:
  __device__ SliceStream(device::SharedMemory& memory, const Copy& copy) : copy_(copy) {
    for (int i = 0; i < 2; ++i) {
      first_[i] = memory.take<T>(tile * device::tile_stride<T, device::slice>);
      second_[i] = memory.take<T>(tile * device::tile_stride<T, device::slice>);
    }
    copy_(first_[0], second_[0]);
    device::copy_async_commit();
  }

  // Goes on to the next step. It is a barrier too: what was written to shared memory before can be read behind it,
  // and what was read there can be overwritten.
  __device__ __forceinline__ void next() {
    device::copy_async_wait<0>();
    device::syncthreads();
    odd_ = !odd_;
    copy_(odd_ ? first_[0] : first_[1], odd_ ? second_[0] : second_[1]);
    device::copy_async_commit();
  }
  __device__ __forceinline__ const T* first() const { return odd_ ? first_[1] : first_[0]; }
  __device__ __forceinline__ const T* second() const { return odd_ ? second_[1] : second_[0]; }

 private:
  Copy copy_;
  T* first_[2];
  T* second_[2];
  bool odd_ = true;  // so that the first step is an even one
};

// A value of a row that its 16 threads have parts of.
template <typename A, typename Combine>
__device__ __forceinline__ A over_row(A value, const Combine& combine) {
#pragma unroll
  for (int bits = device::fma_side / 2; bits > 0; bits /= 2) {
    value = combine(value, device::shuffle_xor(value, bits));
  }
  return value;
}

}  // namespace torchops::kernels::span_attention
