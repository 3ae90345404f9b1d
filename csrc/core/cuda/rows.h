#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/cuda/pack.cuh"
#include "core/rows.h"

// How a kernel that gives rows [B, N, C] to blocks reads them.

namespace torchops {

// Rows that follow each other without a gap, as those of one batch row.
template <typename T>
kernels::Rows<const T> packed_rows(const T* data, int64_t channels) {
  return {data, 0, channels};
}

// Calls body(std::integral_constant<int, width>{}) with the number of elements that rows of `channels` elements are
// read and written at once in all of these: 16 bytes where rows are that well aligned, else one. Absent rows do not
// count.
template <typename T, typename Body>
void for_row_width(int64_t channels, std::initializer_list<kernels::Rows<const T>> all, const Body& body) {
  constexpr int widest = device::widest<T>;
  const bool aligned = std::all_of(all.begin(), all.end(), [](const kernels::Rows<const T>& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride % widest == 0 &&
           rows.row_stride % widest == 0;
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
