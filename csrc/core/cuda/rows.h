#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "core/cuda/pack.cuh"

// How a kernel that gives rows [B, N, C] to blocks reads them.

namespace torchops {

// Calls body(std::integral_constant<int, width>{}) with the number of elements that rows of `channels`
// elements are read and written at once in all of these tensors, which have contiguous rows: 16 bytes
// where rows are that well aligned, else one. Undefined tensors do not count.
template <typename T, typename Body>
void for_row_width(int64_t channels, std::initializer_list<at::Tensor> tensors, const Body& body) {
  constexpr int widest = device::widest<T>;
  const bool aligned = std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
    return !tensor.defined() || (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
                                 tensor.stride(0) % widest == 0 && tensor.stride(1) % widest == 0);
  });
  if (aligned && channels % widest == 0) {
    body(std::integral_constant<int, widest>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

// Threads of a block that has one row, `width` elements each.
inline unsigned threads_for_row(int64_t channels, int64_t width) {
  const int64_t needed = (channels + width - 1) / width;
  return static_cast<unsigned>(std::clamp<int64_t>((needed + 31) / 32 * 32, 32, 256));
}

}  // namespace torchops
