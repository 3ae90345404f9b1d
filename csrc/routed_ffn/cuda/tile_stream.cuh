#pragma once

#include "core/cuda/device.cuh"

namespace torchops::kernels::routed_ffn {

// Pairs of tiles on their way through `stages` pairs of buffers: while a block multiplies one, the next are copied.
// Each call of copy(left, right) starts the copies of one step, or none behind the last.
template <typename Tile, typename T, typename Copy>
class TileStream {
 public:
  __device__ TileStream(device::SharedMemory& memory, const Copy& copy)
      : copy_(copy),
        left_(memory.take<T>(Tile::stages * Tile::left_size)),
        right_(memory.take<T>(Tile::stages * Tile::right_size)) {
    for (int stage = 0; stage < Tile::stages - 1; ++stage) {
      start(stage);
    }
  }

  // Goes on to the next step. It is a barrier too: all have multiplied what the copies that it starts overwrite.
  __device__ __forceinline__ void next() {
    device::copy_async_wait<Tile::stages - 2>();
    device::syncthreads();
    start(current_ < 0 ? Tile::stages - 1 : current_);
    current_ = current_ + 1 == Tile::stages ? 0 : current_ + 1;
  }
  __device__ __forceinline__ const T* left() const { return left_ + current_ * Tile::left_size; }
  __device__ __forceinline__ const T* right() const { return right_ + current_ * Tile::right_size; }

 private:
  Copy copy_;
  T* left_;
  T* right_;
  int current_ = -1;

  __device__ __forceinline__ void start(int stage) {
    copy_(left_ + stage * Tile::left_size, right_ + stage * Tile::right_size);
    device::copy_async_commit();
  }
};

template <typename Tile, typename T>
inline constexpr size_t tile_stream_bytes =
    device::shared_size<T>(Tile::stages * Tile::left_size) + device::shared_size<T>(Tile::stages * Tile::right_size);

}  // namespace torchops::kernels::routed_ffn
