#pragma once

#include <cstdint>

namespace torchops::kernels {

// A tensor [B, H, L, D] as rows of D contiguous elements; strides are counted in elements.
template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;

  constexpr T* row(int64_t batch, int64_t head, int64_t index) const {
    return data + batch * batch_stride + head * head_stride + index * row_stride;
  }
};

}  // namespace torchops::kernels
