#pragma once

#include "core/cuda/device.cuh"

namespace torchops::device {

// `width` neighbours in memory that are read and written at once: 16 bytes where rows allow it.
template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T element[width];
};

template <typename T>
inline constexpr int widest = static_cast<int>(16 / sizeof(T));

template <int width, typename T>
__device__ __forceinline__ Pack<T, width> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

template <int width, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(to) = pack;
}

}  // namespace torchops::device
