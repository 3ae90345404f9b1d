#pragma once

#include <ATen/ops/constant_pad_nd.h>

#include "sparse_attention/code_tensors.h"

namespace torchops {

// Four codes to a word; those that fill up the last one never agree.
inline CodeLayout codes_in_words(const at::Tensor& query_codes, const at::Tensor& key_codes) {
  const int64_t behind = (4 - query_codes.size(3) % 4) % 4;
  const auto filled = [&](const at::Tensor& codes, int code) {
    return (behind == 0 ? codes : at::constant_pad_nd(codes, {0, behind}, code)).contiguous();
  };
  return {filled(query_codes, 0), filled(key_codes, 1), query_codes.size(3) + behind, key_codes.size(2)};
}

}  // namespace torchops
