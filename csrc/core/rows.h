#pragma once

#include <cstdint>

namespace torchops::kernels {

// A tensor [B, N, C] as rows of C contiguous elements; strides are counted in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride;
  int64_t row_stride;

  constexpr T* row(int64_t batch, int64_t index) const { return data + batch * batch_stride + index * row_stride; }
};

}  // namespace torchops::kernels
