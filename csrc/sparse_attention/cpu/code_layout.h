#pragma once

#include <ATen/ops/constant_pad_nd.h>

#include "sparse_attention/code_tensors.h"
#include "sparse_attention/cpu/code_choice_kernel.h"

namespace torchops {

// A row for each subspace, so that a vector of codes is one of keys.
inline CodeLayout subspaces_first(const at::Tensor& query_codes, const at::Tensor& key_codes) {
  const int64_t num_keys = key_codes.size(2), word = kernels::sparse_attention::keys_of_word;
  const int64_t key_stride = (num_keys + word - 1) / word * word;
  return {with_contiguous_rows(query_codes),
          at::constant_pad_nd(key_codes.transpose(2, 3), {0, key_stride - num_keys}).contiguous(), query_codes.size(3),
          key_stride};
}

}  // namespace torchops
