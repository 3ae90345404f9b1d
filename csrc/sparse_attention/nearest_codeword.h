#pragma once

#include "sparse_attention/parts.h"

namespace torchops::kernels::sparse_attention {

// The codeword nearest to each part of a row, the first of equally near ones. A NaN is not near.
template <typename T>
struct NearestCodeword {
  Parts<T> parts;
  uint8_t* codes;  // [R, M]

  constexpr uint8_t& code(int64_t row, int64_t m) const { return codes[row * parts.num_subspaces + m]; }
};

}  // namespace torchops::kernels::sparse_attention
