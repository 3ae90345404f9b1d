#pragma once

#include <cstdint>

#ifndef TORCHOPS_LEVEL
#error "lines.h belongs in *_kernel.cpp files, which are compiled once per level"
#endif

namespace torchops::kernels::inline TORCHOPS_LEVEL {

// Lines of a matrix, whose numbers lie side by side. Where an index says which, line i is the one at index[i].
template <typename T>
struct Lines {
  const T* data;
  int64_t stride;
  const int32_t* index = nullptr;

  const T* operator[](int64_t line) const { return data + (index == nullptr ? line : int64_t{index[line]}) * stride; }

  // What begins at a line and a number of it.
  Lines from(int64_t line, int64_t number) const {
    return index == nullptr ? Lines{data + line * stride + number, stride} : Lines{data + number, stride, index + line};
  }
};

}  // namespace torchops::kernels::inline TORCHOPS_LEVEL
