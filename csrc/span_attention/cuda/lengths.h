#pragma once

#include <ATen/core/Tensor.h>

#include "core/checks.h"

namespace torchops {

// Kernels count the positions of a sequence in 32 bits, a tile further than the last.
inline void check_lengths(const char* op, const at::Tensor& query, const at::Tensor& key) {
  constexpr int64_t longest = int64_t{1} << 30;
  const Checks check(op);
  check.between("query's third dimension on CUDA", query.sym_size(2), 0, longest);
  check.between("key's third dimension on CUDA", key.sym_size(2), 0, longest);
}

}  // namespace torchops
